"""Small classifiers of images, checkpoints of the library and modules of one's own, and rows for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ConvNextConfig, ResNetConfig, ViTConfig

SIZE, CLASSES = 8, 3
NAMES = dict(enumerate(["blank", "left", "top"]))
CONFIGS: dict[str, Any] = {
    "resnet": lambda: ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic"
    ),
    "vit": lambda: ViTConfig(
        num_channels=1, image_size=SIZE, patch_size=4, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ),
    "convnext": lambda: ConvNextConfig(
        num_channels=1, image_size=SIZE, patch_size=2, num_stages=2, hidden_sizes=[4, 6], depths=[1, 1],
        drop_path_rate=0.0,
    ),
}  # fmt: skip


def save(kind: str, folder: Path, seed: int = 0, **more: Any) -> Path:
    """A checkpoint with weights drawn anew, and its processor where Pillow is there."""
    config = CONFIGS[kind]()
    config.update({"num_labels": CLASSES, "id2label": NAMES, "label2id": {n: i for i, n in NAMES.items()}} | more)
    torch.manual_seed(seed)
    AutoModelForImageClassification.from_config(config).eval().save_pretrained(folder)
    processor_of(SIZE).save_pretrained(folder)
    return folder


def processor_of(size: int) -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5], image_std=[0.5])


def pictures(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise, a bright left half or a bright upper half: (n, 1, 8, 8) in [-1, 1], and which, (n,)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=g)
    images = 0.6 * torch.rand(rows, 1, SIZE, SIZE, generator=g) - 0.8
    images[labels == 1, :, :, : SIZE // 2] += 0.8
    images[labels == 2, :, : SIZE // 2] += 0.8
    return images.clamp(-1, 1), labels


def save_rows(file: Path, rows: int, seed: int = 0) -> Path:
    images, labels = pictures(rows, seed)
    save_file({"inputs": images, "labels": labels}, file)
    return file


def save_folder(root: Path, rows: int, seed: int = 0) -> Path:
    """The same pictures in 8 bits as PNG files, each in the directory of its class."""
    from PIL import Image

    for row, (image, label) in enumerate(zip(*pictures(rows, seed), strict=True)):
        (root / NAMES[int(label)]).mkdir(parents=True, exist_ok=True)
        gray = ((image[0] + 1) / 2 * 255).round().byte().numpy()
        Image.fromarray(gray).save(root / NAMES[int(label)] / f"{row:03}.png")
    return root


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(),
        nn.Linear(24, CLASSES),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, CLASSES))


def of_two_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 2))


def with_batch_statistics() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))


def without_parameters() -> nn.Module:
    return nn.Flatten()
