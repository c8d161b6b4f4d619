"""Run as a program: encode inputs with sentence-transformers alone.

Usage: encode_elsewhere.py MODEL_DIR INPUTS_JSON OUTPUT_NPY [TORCHVISION_FOLDER]
INPUTS_JSON holds a list of inputs; in them {"path": file} stands for an image.
"""

import json
import sys

import numpy as np
import PIL.Image
import torch

# Names only: torchvision declares fake versions of its C++ operators when imported, and its wheel
# cannot load the operators themselves beside a CPU build of torch. No test runs one of them.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    *(
        f"{name}(Tensor input) -> Tensor"
        for name in (
            "roi_align",
            "_roi_align_backward",
            "ps_roi_align",
            "_ps_roi_align_backward",
            "roi_pool",
            "_roi_pool_backward",
            "ps_roi_pool",
            "_ps_roi_pool_backward",
            "qroi_align",
            "deform_conv2d",
            "_deform_conv2d_backward",
        )
    ),
)


def import_torchvision(folder: str | None) -> None:
    """Import it from `folder`; where its operators do not load, declare them first."""
    if folder:
        sys.path.insert(0, folder)
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import_torchvision.library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in OPERATORS:
            import_torchvision.library.define(operator)
        import torchvision
    assert torchvision.__version__


def opened(value):
    if isinstance(value, dict) and set(value) == {"path"}:
        return PIL.Image.open(value["path"]).convert("RGB")
    if isinstance(value, dict):
        return {key: opened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [opened(item) for item in value]
    return value


def main(model: str, inputs: str, output: str, torchvision_folder: str | None = None) -> None:
    for name in ("moca", "moca_fast", "moca_triton"):
        sys.modules[name] = None  # importing it raises ImportError
    import_torchvision(torchvision_folder)
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    with open(inputs, encoding="utf-8") as file:
        values = opened(json.load(file))
    singly = np.stack([encoder.encode([value])[0] for value in values])
    # Chat messages are a batch of their own: mixed with other inputs, 6.2 drops their content.
    together = np.empty_like(singly)
    for messages in (False, True):
        rows = [i for i, value in enumerate(values) if isinstance(value, list) == messages]
        together[rows] = encoder.encode([values[i] for i in rows], batch_size=len(rows))
    np.save(output, np.stack([singly, together]))


if __name__ == "__main__":
    main(*sys.argv[1:])
