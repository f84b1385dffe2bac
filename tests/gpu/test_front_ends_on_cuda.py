"""The front ends on a real GPU: the tokens and images of the same models in ordinary memory."""

import pytest
import torch
from torch.utils._pytree import tree_map

import penstock
from gpu.scenes import run_scene
from python.support import PAGERS, same_bits

transformers = pytest.importorskip("transformers")
front_end = pytest.importorskip("penstock.integrations.transformers")
try:
    front_end._require_version(transformers.__version__)
except penstock.PenstockError as error:
    pytest.skip(str(error), allow_module_level=True)

from python.integrations.transformers_zoo import kinds, save  # noqa: E402  transformers is there

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # of whichever versions that machine has
]

DEVICE = "cuda"
MIB = 1 << 20
PAGE = 2 * MIB
KINDS = kinds(4)


@pytest.fixture(scope="module", autouse=True)
def plain_choices():
    """Have libraries choose kernels that give the same bits each time."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    transformers.logging.set_verbosity_error()
    yield
    torch.backends.cudnn.deterministic = before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = save(KINDS[name], tmp_path_factory.mktemp("model"), deviation=0.1)
        return made[name]

    return get


def resident(directory, name):
    cls = getattr(transformers, KINDS[name].model)
    return cls.from_pretrained(directory).to(DEVICE)


def streamed(directory, pager):
    """Load a model under a cap of half of it."""
    nbytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    cap = nbytes // 2 // PAGE * PAGE
    return front_end.load(directory, cap, device=DEVICE, pager=pager, page_size=PAGE)


def answers(model, name):
    with torch.no_grad():
        found = KINDS[name].run(model)
    return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, found)


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("name", KINDS)
def test_answers_and_tokens_are_those_of_the_resident_model(name, pager, saved):
    directory = saved(name)
    plain = resident(directory, name)
    wanted = answers(plain, name)
    if not same_bits(answers(plain, name), wanted):
        pytest.skip("the resident model differs from itself here")
    del plain
    model = streamed(directory, pager)
    for number in range(3):
        assert same_bits(answers(model, name), wanted), f"run {number} differs"
    stats = penstock.manager_of(model).stats()
    assert stats.peak <= stats.cap < stats.models["model"].nbytes
    assert stats.evicted_bytes > 0


def test_pipeline(saved):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, **{f"w{number}": number for number in range(1, 100)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    options = {"unk_token": "[UNK]", "pad_token": "[UNK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **options)
    found = []
    for model in (streamed(saved("llama"), "frames"), resident(saved("llama"), "llama")):
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        found.append(pipe("w3 w14 w15 w92", max_new_tokens=6, do_sample=False))
    assert found[0] == found[1]


# Pages beside which there is no room: enough for what one call needs, too few for all parts.
PIPELINES = {"sdxl": 3, "flux": 3, "wan": 2, "ltx": 2}


@pytest.mark.parametrize("name", PIPELINES)
def test_images_are_those_of_the_pipeline_in_ordinary_memory(name, tmp_path):
    pytest.importorskip("diffusers", reason="pip install '.[diffusers]'")
    from penstock.integrations import diffusers as pipelines
    from python.integrations.diffusers_zoo import draw, make, modules

    plain = make(name)
    plain.save_pretrained(tmp_path)
    plain.to(DEVICE)
    wanted = draw(plain, name).cpu()
    if not same_bits(draw(plain, name).cpu(), wanted):
        pytest.skip("the pipeline differs from itself here")
    # On a GPU, the driver's tables for the host memory of each part count too.
    cap = (PIPELINES[name] + len(modules(plain))) * PAGE
    pipeline = pipelines.load(tmp_path, cap, device=DEVICE, pager="frames", page_size=PAGE)
    for number in range(2):
        assert same_bits(draw(pipeline, name).cpu(), wanted), f"run {number} differs"
    stats = pipelines.manager_of(pipeline).stats()
    assert stats.peak <= stats.cap
    assert stats.evicted_bytes > 0


@pytest.mark.parametrize("scene", ["cache", "pipelines"])
def test_under_a_hard_cap(scene):
    if scene == "pipelines":
        pytest.importorskip("diffusers", reason="pip install '.[diffusers]'")
    run_scene("front_end_scenes.py", scene, 300)
