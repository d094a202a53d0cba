"""What is measured: answers under teacher forcing, free generation, perplexity and speed, and how sure a mean is."""

from .generation import continuations, first_statement, generate, is_answered, room_for, starts_with
from .intervals import Interval, interval_of_mean, interval_of_mean_score, interval_of_ratio
from .success import Success, success
from .teacher_forcing import Answer, Asking, agreement, answers
from .text import forward_costs, perplexity, perplexity_of, window_losses

__all__ = [
    "Answer",
    "Asking",
    "Interval",
    "Success",
    "agreement",
    "answers",
    "continuations",
    "first_statement",
    "forward_costs",
    "generate",
    "interval_of_mean",
    "interval_of_mean_score",
    "interval_of_ratio",
    "is_answered",
    "perplexity",
    "perplexity_of",
    "room_for",
    "starts_with",
    "success",
    "window_losses",
]
