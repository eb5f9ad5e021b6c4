"""A tiny BERT and a tiny ViT, and texts and images with classes that they can learn."""

from __future__ import annotations

import json

import numpy as np
import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(28))]


def write_bert(path, **changes):
    """A BERT without a head, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(path)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    BertModel(
        BertConfig(**{"vocab_size": len(WORDS), "max_position_embeddings": 32, **shape, **changes})
    ).save_pretrained(path)


def write_vit(path):
    """A ViT for images of 8 by 8 without a head, and its image processor."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(1)
    ViTModel(ViTConfig(image_size=8, patch_size=4, **shape)).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(path)


def sentences(count, seed=0):
    """Different texts of 2 to 9 words, in class 1 of the first fourteen words and in class 0 of the others."""
    generator = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        label = int(generator.integers(2))
        words = generator.integers(0, 14, generator.integers(2, 10)) + (0 if label else 14)
        found[" ".join(f"w{i}" for i in words)] = label
    return [{"sentence": text, "label": label} for text, label in found.items()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_images(directory, count, seed=0):
    """Images of 10 by 12, dark in the folder "a" and bright in the folder "b"."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    for i in range(count):
        name, low = ("a", 0) if i % 2 == 0 else ("b", 128)
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(low, low + 128, (10, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return directory
