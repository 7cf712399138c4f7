"""Small models that see images, with processors, and rows with images for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaProcessor, PreTrainedTokenizerFast

from calib.data.image_rows import Encode
from tests import any_type, tasks

IMAGE, START, END, VIDEO = 152, 150, 151, 153
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for part in m.content %}{% if part.type == 'image' %} <image> "
    "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
)


def save(model_type: str, folder: Path) -> Any:
    """A model with weights drawn anew and its processor, in `folder`.  -> the model."""
    config: Any = any_type.config_of(model_type)
    config.image_token_id, config.vision_start_token_id, config.vision_end_token_id = IMAGE, START, END
    config.video_token_id, config.image_token_index = VIDEO, IMAGE
    if model_type == "llava":
        config.vision_config.image_size = 4 * config.vision_config.patch_size
    elif model_type == "qwen3_vl":
        config.vision_config.deepstack_visual_indexes = [0, 2]
    else:
        config.vision_config.fullatt_block_indexes = [1, 3]
        config.text_config.rope_parameters = config.text_config.rope_parameters | {"mrope_section": [2, 3, 3]}
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (p.dim() == 1))
    model.save_pretrained(folder)
    if model_type == "llava":
        _processor(config).save_pretrained(folder)
    return model.requires_grad_(False)


def _processor(config: Any) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = {word: i for i, word in enumerate(tasks.WORDS) if i < START} | {"user": 5, "assistant": 6, "<image>": IMAGE}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", extra_special_tokens=["<image>"]
    )
    size = config.vision_config.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return LlavaProcessor(
        images, tokenizer, patch_size=config.vision_config.patch_size, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip


def qwen_encoder(config: Any) -> Encode:
    """What Qwen's processors make of a conversation; those themselves want torchvision, for videos."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    patch, merge = config.vision_config.patch_size, config.vision_config.spatial_merge_size
    images = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=merge, temporal_patch_size=config.vision_config.temporal_patch_size,
        min_pixels=(merge * patch) ** 2, max_pixels=(3 * merge * patch) ** 2,
    )  # fmt: skip

    def encode(messages: list[dict[str, Any]], where: str) -> dict[str, Tensor]:
        ids, files = list[int](), list[Any]()
        for part in (part for message in messages for part in message["content"]):
            if part["type"] == "text":
                ids += [tasks.WORDS.index(word) for word in part["text"].split()]
                continue
            files.append(Image.open(part["path"]).convert("RGB"))
            grid = images(files[-1:], return_tensors="pt")["image_grid_thw"][0]
            ids += [START, *[IMAGE] * int(grid.prod() // merge**2), END]
        row = torch.tensor([ids])
        return {"input_ids": row, "mm_token_type_ids": (row == IMAGE).long(), **images(files, return_tensors="pt")}

    return encode


def rows_file(folder: Path, rows: int = 10) -> Path:
    """Rows of one or two images, of unlike sizes and layouts."""
    from PIL import Image

    draw = torch.Generator().manual_seed(3)
    lines = list[dict[str, Any]]()
    for i in range(rows):
        names = [f"{i}-{n}.png" for n in range(1 + i % 2)]
        for n, name in enumerate(names):
            pixels = torch.randint(0, 256, (60 + 20 * n, 80 + 10 * (i % 3), 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name)
        question, answer = tasks.text(3 + i % 4, i), tasks.text(6, 50 + i)
        if i % 2:
            parts = [*({"type": "image", "path": name} for name in names), {"type": "text", "text": question}]
            turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
            lines.append({"messages": turns})
        else:
            lines.append({"images": names, "prompt": question, "completion": answer})
    file = folder / "pictures.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
