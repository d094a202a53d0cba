"""Which device is meant, on machines that may lack it."""

from __future__ import annotations

import logging
from typing import Any

import torch

LOG = logging.getLogger(__name__)


def settle_device(hparams: Any) -> None:
    """Write `hparams.device` in a form that both versions understand, and that this machine has.

    A digit string becomes a number; a CUDA device on a machine without CUDA becomes "cpu", with a warning; None
    becomes "cuda" or "cpu". Anything else ("cpu", "cuda:1", "mps", a torch.device) stays.
    """
    if not hasattr(hparams, "device"):
        return
    asked = hparams.device
    if asked is None or asked == "":
        hparams.device = "cuda" if torch.cuda.is_available() else "cpu"
        return
    if isinstance(asked, str) and asked.strip().isdigit():
        hparams.device = int(asked)
    if torch_device(hparams.device).type == "cuda" and not torch.cuda.is_available():
        LOG.warning("device %r was asked for, but CUDA is not available here; running on the CPU", asked)
        hparams.device = "cpu"


def torch_device(device: Any) -> torch.device:
    """A settled device as PyTorch names it; a number is that CUDA device."""
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
