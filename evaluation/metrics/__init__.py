"""What is measured: answers under teacher forcing, free generation, perplexity and speed, and how sure a mean is."""

from .generation import continuations, first_statement, generate, is_answered, room_for, starts_with
from .intervals import Interval, interval_of_mean, interval_of_mean_score, interval_of_ratio, mean_of_known
from .success import Success, success
from .teacher_forcing import Answer, Asking, agreement, answers
from .text import forward_seconds, perplexity, perplexity_of, wait, window_losses

__all__ = [
    "Answer",
    "Asking",
    "Interval",
    "Success",
    "agreement",
    "answers",
    "continuations",
    "first_statement",
    "forward_seconds",
    "generate",
    "interval_of_mean",
    "interval_of_mean_score",
    "interval_of_ratio",
    "is_answered",
    "mean_of_known",
    "perplexity",
    "perplexity_of",
    "room_for",
    "starts_with",
    "success",
    "wait",
    "window_losses",
]
