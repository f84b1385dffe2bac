"""Models of transformers from their directories: the bits and tokens of `from_pretrained`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from penstock import CheckpointError, MemoryManager
from python.support import KIB, PAGERS, same_bits, state_of

transformers = pytest.importorskip("transformers")
front_end = pytest.importorskip("penstock.integrations.transformers")

from python.integrations.transformers_zoo import IDS, kinds, save  # noqa: E402  transformers is there

PAGE = 64 * KIB
KINDS = kinds()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save(KINDS[name], tmp_path_factory.mktemp("model"))
        return made[name]

    return get


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    yield


def resident(directory: Path, model: str, **options: Any) -> Any:
    return getattr(transformers, model).from_pretrained(directory, **options)


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("name", KINDS)
def test_answers_and_tokens_are_those_of_the_resident_model(
    name: str, pager: str, saved: Callable[[str], Path]
) -> None:
    kind, directory = KINDS[name], saved(name)
    plain = resident(directory, kind.model)
    nbytes = sum(parameter.nbytes for parameter in plain.parameters())
    cap = max(nbytes // 2, 0) // PAGE * PAGE
    model = front_end.load(directory, cap, device="cpu", pager=pager, page_size=PAGE, verify=True)
    with torch.no_grad():
        wanted = kind.run(plain)
        for number in range(2):
            assert same_bits(kind.run(model), wanted), f"run {number} differs"
    assert type(model) is type(plain)
    assert same_bits(state_of(model), state_of(plain))
    stats = penstock.manager_of(model).stats()
    assert stats.peak <= stats.cap == cap < stats.models["model"].nbytes
    assert stats.evicted_bytes > 0


# ---- what a directory may hold -----------------------------------------------------------------


def load(directory: Path, cap: int = 12 * PAGE, **options: Any) -> Any:
    options = {"device": "cpu", "page_size": PAGE, **options}
    return front_end.load(directory, cap, **options)


def edit(file: Path, **changes: Any) -> None:
    """Change values of a JSON file; None takes one out."""
    content = {**json.loads(file.read_text()), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept))


@pytest.mark.parametrize("host", ("pinned", "mapped", "stream"))
def test_experts_come_from_the_files_without_memory_of_their_own(
    host: str, saved: Callable[[str], Path]
) -> None:
    # Stored one by one, held together: with a copy of them, no budget this small would do.
    directory = saved("mixtral")
    budget = {"pinned": None, "mapped": 1, "stream": 4 * PAGE}[host]
    model = load(directory, 2048 * KIB, pager="frames", host=host, host_budget=budget)
    plain = resident(directory, "MixtralForCausalLM")
    with torch.no_grad():
        assert same_bits(model(IDS).logits, plain(IDS).logits)


def test_shards(saved: Callable[[str], Path], tmp_path: Path) -> None:
    plain = resident(saved("mixtral"), "MixtralForCausalLM")
    plain.save_pretrained(tmp_path, max_shard_size="600KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same_bits(state_of(load(tmp_path, 2048 * KIB)), state_of(plain))


def test_torch_file(saved: Callable[[str], Path], tmp_path: Path) -> None:
    plain = resident(saved("llama, tied"), "LlamaForCausalLM")
    plain.config.save_pretrained(tmp_path)
    torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        assert same_bits(load(tmp_path)(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("says", ("bfloat16", "float32", None))
@pytest.mark.parametrize("wanted", (None, torch.bfloat16, torch.float16))
def test_dtype_is_what_from_pretrained_decides(
    says: str | None, wanted: torch.dtype | None, tmp_path: Path
) -> None:
    save(KINDS["t5"], tmp_path)  # it keeps some weights in float32
    edit(tmp_path / "config.json", dtype=says)
    plain = resident(tmp_path, "T5ForConditionalGeneration", dtype=wanted or "auto")
    model = load(tmp_path, dtype=wanted)
    assert same_bits(state_of(model), state_of(plain))
    assert model.dtype == plain.dtype
    with torch.no_grad():
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
        assert same_bits(model(**inputs).logits, plain(**inputs).logits)


def test_weights_of_a_base_model_and_of_one_with_a_head(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    inner = load(saved("llama"), model_class="AutoModel")  # takes the prefix off, leaves the head
    plain = resident(saved("llama"), "LlamaModel")
    with torch.no_grad():
        assert same_bits(inner(IDS).last_hidden_state, plain(IDS).last_hidden_state)
    plain.save_pretrained(tmp_path)
    full = load(tmp_path, model_class="LlamaForCausalLM", strict=False)
    assert same_bits(state_of(full.model), state_of(plain))


def test_parameters_without_a_value(saved: Callable[[str], Path]) -> None:
    directory = saved("bert")
    kind = "AutoModelForSequenceClassification"
    with pytest.raises(
        CheckpointError, match=r"lacks 4 parameters of BertForSequence.*strict=False"
    ):
        load(directory, model_class=kind)
    torch.manual_seed(3)
    model = load(directory, model_class=kind, strict=False)
    torch.manual_seed(3)
    plain = resident(directory, "BertForSequenceClassification")
    assert same_bits(state_of(model), state_of(plain))


def test_generation_configuration(saved: Callable[[str], Path], tmp_path: Path) -> None:
    plain = resident(saved("llama"), "LlamaForCausalLM")
    plain.generation_config.max_new_tokens = 3
    plain.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.generation_config.max_new_tokens == 3
    assert model.generate(IDS, attention_mask=torch.ones_like(IDS)).shape == (2, 9)


def test_configuration_of_ones_own(saved: Callable[[str], Path]) -> None:
    directory = saved("llama")
    config = transformers.AutoConfig.from_pretrained(directory, attn_implementation="eager")
    model = load(directory, config=config, model_class=transformers.AutoModelForCausalLM)
    plain = resident(directory, "LlamaForCausalLM", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        assert same_bits(model(IDS).logits, plain(IDS).logits)


# ---- what a model can do -----------------------------------------------------------------------


@pytest.mark.parametrize("pager", PAGERS)
def test_model_says_what_it_is(pager: str, saved: Callable[[str], Path]) -> None:
    model = load(saved("llama"), pager=pager)
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.model_type == "llama"
    assert model.name_or_path == str(saved("llama"))
    assert model.to("cpu") is model
    assert penstock.manager_of(model).stats().models["model"].moved == ()


def test_parts_that_stay_and_parts_that_stream(saved: Callable[[str], Path]) -> None:
    model = load(saved("llama"), pin=["lm_head"], stream=["model.layers.0"], pager="frames")
    size = penstock.manager_of(model).stats().models["model"].memory.resident_bytes
    assert size >= model.lm_head.weight.nbytes
    with torch.no_grad():
        plain = resident(saved("llama"), "LlamaForCausalLM")
        assert same_bits(model(IDS).logits, plain(IDS).logits)
    with pytest.raises(penstock.ModelError, match=r"'no\.such' matches no module"):
        load(saved("llama"), pin=["no.such"])


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("name", ("llama, tied", "mixtral", "t5"))
def test_saved_model_is_the_one_that_was_loaded(
    name: str, pager: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(saved(name), 2048 * KIB, pager=pager)
    model.save_pretrained(tmp_path)
    names = {file.name for file in saved(name).iterdir()}
    assert {file.name for file in tmp_path.iterdir()} == names
    file = "model.safetensors"
    assert (tmp_path / file).read_bytes() == (saved(name) / file).read_bytes()


@pytest.mark.parametrize("pager", PAGERS)
def test_pipeline(pager: str, saved: Callable[[str], Path]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, **{f"w{number}": number for number in range(1, 100)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[UNK]"
    )
    found = []
    for model in (load(saved("llama"), pager=pager), resident(saved("llama"), "LlamaForCausalLM")):
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        found.append(pipe("w3 w14 w15 w92", max_new_tokens=6, do_sample=False))
    assert found[0] == found[1]
    assert found[0][0]["generated_text"].count("w") == 10


def test_beams_and_a_static_cache(saved: Callable[[str], Path]) -> None:
    model, plain = load(saved("qwen2")), resident(saved("qwen2"), "Qwen2ForCausalLM")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 5}
    for options in ({"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}):
        same = {**inputs, **options, "do_sample": False, "disable_compile": True}
        assert same_bits(model.generate(**same), plain.generate(**same))


def test_several_under_one_cap(saved: Callable[[str], Path]) -> None:
    manager = MemoryManager(cap=24 * PAGE, device="cpu", page_size=PAGE)
    for name in ("llama", "t5"):
        front_end.register(manager, name, saved(name))
    for name in ("llama", "t5", "llama"):
        plain = resident(saved(name), KINDS[name].model)
        with torch.no_grad(), manager.use(name) as model:
            assert same_bits(KINDS[name].run(model), KINDS[name].run(plain))
    assert manager.stats().used == 0
    assert manager.stats().peak <= manager.stats().cap


def test_it_is_not_given_back(saved: Callable[[str], Path]) -> None:
    model = load(saved("llama"))
    with pytest.raises(penstock.ModelError, match="read from its checkpoint"):
        penstock.restore(model)
    model(IDS)  # and can be used on


# ---- what is refused ---------------------------------------------------------------------------


def refusal(directory: Path, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(directory, **options)
    return caught.value


def test_version_that_is_too_old(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved("llama")
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(penstock.PenstockError, match=r"4\.57\.1 is too old.*transformers>=5.17"):
        load(directory)


def test_no_directory_is_looked_for_elsewhere(tmp_path: Path) -> None:
    error = refusal(tmp_path / "owner" / "name")
    assert "config.json" in str(error)
    assert "not a file or the name of a repository" in str(error)
    assert error.path == tmp_path / "owner" / "name" / "config.json"


@pytest.mark.parametrize("text", ("{", "[]", '{"model_type": "no such model"}', "{}"))
def test_configuration_that_cannot_be_used(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path / "config.json") in str(refusal(tmp_path))


def test_unknown_class(tmp_path: Path) -> None:
    save(KINDS["llama"], tmp_path)
    edit(tmp_path / "config.json", architectures=["LlamaForWhatIsNotThere"])
    assert "has no class 'LlamaForWhatIsNotThere'" in str(refusal(tmp_path))
    assert "model_class" in str(refusal(tmp_path, model_class="Pipeline"))


def test_no_weights(tmp_path: Path) -> None:
    save(KINDS["llama"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "holds no safetensors file" in str(refusal(tmp_path))


def test_missing_shard(saved: Callable[[str], Path], tmp_path: Path) -> None:
    resident(saved("llama"), "LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="600KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in str(refusal(tmp_path))


def test_other_sizes(tmp_path: Path) -> None:
    save(KINDS["llama"], tmp_path)
    edit(tmp_path / "config.json", intermediate_size=256)
    message = str(refusal(tmp_path))
    assert "mlp.down_proj.weight' has [128, 320] and should have [128, 256]" in message
    assert "9 such tensors" in message


def test_quantized_weights(tmp_path: Path) -> None:
    save(KINDS["llama"], tmp_path)
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(tmp_path / "config.json", quantization_config=quantized)
    message = str(refusal(tmp_path))
    assert "'bitsandbytes'" in message
    assert "checkpoint without quantization" in message
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert "'bitsandbytes'" in str(refusal(tmp_path, config=config))


OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "penstock-test-own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(160, 160) for _ in range(4))
        self.post_init()
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
"""


def test_code_in_the_directory_runs_only_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    cache = str(tmp_path / "cache")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    directory = tmp_path / "model"
    directory.mkdir()
    torch.manual_seed(0)
    layers = {f"layers.{number}": torch.nn.Linear(160, 160) for number in range(4)}
    weights = {
        f"{name}.{part}": tensor.detach()
        for name, layer in layers.items()
        for part, tensor in layer.named_parameters()
    }
    save_file(weights, directory / "model.safetensors")
    (directory / "own.py").write_text(OWN_CODE)
    config = {
        "model_type": "penstock-test-own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    error = refusal(directory)
    assert "trust_remote_code=True" in str(error)
    assert not Path(cache).exists()
    model = load(directory, 256 * KIB, trust_remote_code=True)
    x = torch.ones(2, 160)
    wanted = x
    with torch.no_grad():
        for layer in layers.values():
            wanted = layer(wanted)
        assert same_bits(model(x), wanted)
