"""CLIP's embeddings and score against transformers, a random model in its own directory."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from cnxs_jax.errors import CheckpointError
from eval import networks
from eval.measures import METRICS, Sample
from eval.metrics import clip_features
from eval.plan import Prompts
from tests.parity.helpers import perturb, relative_error

pytestmark = pytest.mark.parity
TEXTS = ["a cat", "two dogs and a boat", "z " * 60]  # the last one is cut
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZE = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory of transformers' CLIPModel with a tokenizer of letters."""
    root = tmp_path_factory.mktemp("clip")
    words = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(words)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"))
    tokenizer.save_pretrained(root)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = shared | {"vocab_size": len(words), "hidden_size": 32, "eos_token_id": len(words) - 1,
                     "bos_token_id": len(words) - 2, "max_position_embeddings": 40}  # fmt: skip
    vision = shared | {"hidden_size": 40, "image_size": SIZE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    torch.manual_seed(0)
    model = perturb(transformers.CLIPModel(config))
    model.save_pretrained(root)
    return root, model, tokenizer


def embeddings(model, tokenizer, images):
    size = {"shortest_edge": SIZE}
    crop = {"height": SIZE, "width": SIZE}
    slow = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = slow(size=size, crop_size=crop)
    pixels = processor([Image.fromarray(i) for i in images], return_tensors="pt").pixel_values
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=40,
                       return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, pixel_values=pixels)
    return out


def test_embeddings_and_score(place):
    root, model, tokenizer = place
    y, x = np.mgrid[:30, :52] / 7
    smooth = [
        np.stack([np.sin(x * k + c) * np.cos(y + k) for c in range(3)], -1) for k in (1, 2, 3)
    ]
    images = np.round(127 + 100 * np.stack(smooth)).astype(np.uint8)
    theirs = embeddings(model, tokenizer, images)
    tools = networks.Tools({"clip": str(root)}, "clip")
    sample = Sample(images, Prompts("test", TEXTS), tools)
    ours = sample.features("clip")
    unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    assert relative_error(unit, theirs.image_embeds) <= 1e-3  # 8-bit resizing: a level in 255
    texts = tools.clip.embed_texts(TEXTS)
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    assert relative_error(unit, theirs.text_embeds) <= 1e-5
    score = METRICS["clip_score"].figures(sample, None, None, tools)
    cosines = (theirs.image_embeds * theirs.text_embeds).sum(1).clamp(min=0)
    assert score["clip_score_w40_8_24"]["value"] == pytest.approx(
        100 * float(cosines.mean()), rel=1e-3
    )


def test_a_directory_without_both_towers_is_refused(place, tmp_path):
    root, _, _ = place
    with pytest.raises(CheckpointError, match="no CLIP there"):
        clip_features.load_clip(tmp_path)
    config = json.loads((root / "config.json").read_text())
    del config["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="both towers"):
        clip_features.load_clip(tmp_path)
