"""Print the name of the folder in bench/results/ for runs on this GPU: h200, else the device's name."""

from __future__ import annotations

import re


def folder(device: str) -> str:
    """Give the folder's name for what `torch.cuda.get_device_name` gives."""
    if "H200" in device:
        return "h200"
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    import torch

    print(folder(torch.cuda.get_device_name()) if torch.cuda.is_available() else "no-gpu")
