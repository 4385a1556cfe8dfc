"""What sentence-transformers and diffusers save of an AdaLoRA adapter of ours, and load."""

import json

import numpy as np
import pytest
import torch
from hands import config, train_attached
from helpers import triplets_in
from peft import AdaLoraConfig, PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer

from adalora_kernels.export import export_lora, save_adapter


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=21, intermediate_size=24, **sizes)).save_pretrained(path)
    return path


def test_sentence_transformers(bert, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    models = pytest.importorskip("sentence_transformers.models")
    words = ["a b c", "n o p"]

    def make():
        transformer = models.Transformer(str(bert))
        return library.SentenceTransformer(
            modules=[transformer, models.Pooling(transformer.get_word_embedding_dimension())]
        )

    model = make()
    model.add_adapter(config(target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    allocator = train_attached(
        model, lambda: model(model.tokenize(words))["sentence_embedding"].square().mean()
    )
    assert sum(allocator.ranks().values()) == 12
    expected = model.encode(words)
    assert np.abs(expected - make().encode(words)).max() > 1e-3
    model.save(str(tmp_path / "saved"))
    assert sum(triplets_in(tmp_path / "saved").values()) == 12
    whole = library.SentenceTransformer(str(tmp_path / "saved"))
    save_adapter(model, tmp_path / "compact")
    save_adapter(model, tmp_path / "checkpoint", full_rank=True)
    export_lora(model, tmp_path / "lora")
    results = [whole]
    for folder in ("saved", "checkpoint", "lora"):
        results.append(make())
        results[-1].load_adapter(str(tmp_path / folder))
    for other in results:
        np.testing.assert_allclose(other.encode(words), expected, atol=1e-6)
    # Only PEFT's own loader reads that form.
    with pytest.raises(RuntimeError, match="mismatch"):
        make().load_adapter(str(tmp_path / "compact"))
    plain = PeftModel.from_pretrained(BertModel.from_pretrained(bert), tmp_path / "compact").eval()
    tokens = {n: t for n, t in model.tokenize(words).items() if isinstance(t, torch.Tensor)}
    ours = model[0](dict(tokens))["token_embeddings"]
    torch.testing.assert_close(plain(**tokens).last_hidden_state, ours)


def unet(library):
    torch.manual_seed(0)
    return library.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )


def test_diffusers(tmp_path):
    library = pytest.importorskip("diffusers", reason="needs diffusers")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([1, 2])
    x = *x, torch.randn(2, 3, 8, generator=generator)

    def sample(model):
        with torch.no_grad():
            return model.eval()(*x).sample

    model = unet(library).requires_grad_(False)
    model.add_adapter(config(target_modules=["to_q", "to_v"], task_type=None))
    allocator = train_attached(model, lambda: model(*x).sample.square().mean())
    expected = sample(model)
    assert (expected - sample(unet(library))).abs().max() > 1e-3
    # diffusers writes an AdaLoRA adapter, ours like PEFT's, and reads only LoRA.
    model.save_lora_adapter(tmp_path / "own")
    name = "pytorch_lora_weights.safetensors"
    with pytest.raises(TypeError, match="LoraConfig"):
        unet(library).load_lora_adapter(tmp_path / "own", prefix=None, weight_name=name)
    with safe_open(tmp_path / "own" / name, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    other = unet(library)
    other.add_adapter(AdaLoraConfig(**metadata))
    set_peft_model_state_dict(other, load_file(tmp_path / "own" / name))
    torch.testing.assert_close(sample(other), expected)
    assert metadata["rank_pattern"] is None
    assert sum(triplets_in(load_file(tmp_path / "own" / name)).values()) == sum(
        allocator.ranks().values()
    )
    # As LoRA it reads them.
    export_lora(model, tmp_path / "lora")
    other = unet(library)
    other.load_lora_adapter(
        tmp_path / "lora", prefix="base_model.model", weight_name="adapter_model.safetensors"
    )
    torch.testing.assert_close(sample(other), expected)
    for folder, save in (("compact", save_adapter), ("lora", export_lora)):
        save(model, tmp_path / folder)
        plain = PeftModel.from_pretrained(unet(library), tmp_path / folder)
        torch.testing.assert_close(sample(plain), expected)
