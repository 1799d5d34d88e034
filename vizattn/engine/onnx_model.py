"""An ONNX file as a model of torch, run by onnxruntime."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizattn.errors import VizattnError

__all__ = ["OnnxModel", "need_onnx"]


def need_onnx() -> None:
    """See that the packages of the extra are installed.

    Raises:
        VizattnError: They are not.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise VizattnError(f"ONNX needs {' and '.join(missing)}: pip install 'vizattn[export]'.")


class OnnxModel(nn.Module):
    """Images (B, 3, H, W) -> logits, on the CPU.

    Args:
        written: The file's bytes.
        size: Of a segmenter that takes images of one size, its height and width: smaller ones are padded with zeros,
            the mean colour, at the right and below, and the logits cut.
    """

    stride = 1  # as of a segmenter with logits for each pixel
    auxiliary_head = None

    def __init__(self, written: bytes, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a failure is raised
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        height, width = images.shape[-2:]
        if self.size is not None:
            images = F.pad(images, (0, self.size[1] - width, 0, self.size[0] - height))
        (logits,) = self.session.run(None, {"images": images.numpy()})
        found = torch.from_numpy(logits)
        return found if self.size is None else found[..., :height, :width]
