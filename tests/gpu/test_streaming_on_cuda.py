"""Frames, capture and host tiers on a real GPU."""

import gc

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import penstock
from penstock import ModelError, ScheduleError

pytestmark = pytest.mark.gpu

MIB = 1 << 20
WIDTH = 1024
LAYERS = 16  # 4 MiB each


def stack():
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(3)
    model = stack()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model = model.cuda()
    x = torch.randn(4, WIDTH, device="cuda")
    with torch.no_grad():
        return state, model, x, model(x)


def manager_of(state, cap="24MiB", **options):
    options.setdefault("pager", "frames")
    manager = penstock.MemoryManager(cap=cap, device="cuda", page_size="2MiB", **options)
    manager.register("m", stack, state)
    return manager


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("cap", ["16MiB", "24MiB", "48MiB", "128MiB"])
def test_output_is_bit_identical_under_any_cap(reference, cap, verify):
    state, _, x, wanted = reference
    manager = manager_of(state, cap, verify=verify)
    for _ in range(2):
        with torch.no_grad(), manager.use("m") as model:
            for _ in range(12):
                assert torch.equal(model(x), wanted)
            memory = manager.stats().models["m"].memory
            assert cap == "128MiB" or 0 < memory.ring_bytes < 64 * MIB
        stats = manager.stats()
        assert stats.peak <= stats.cap
        assert stats.used_by_tag["weights"] == 0


def test_a_pass_moves_what_is_not_resident(reference):
    state, _, x, wanted = reference
    manager = manager_of(state)
    with torch.no_grad(), manager.use("m") as model:
        for _ in range(12):
            assert torch.equal(model(x), wanted)
        torch.cuda.synchronize()
        before = manager.stats().models["m"].memory
        for _ in range(4):
            model(x)
        torch.cuda.synchronize()
        after = manager.stats().models["m"].memory
    assert after.loaded_bytes - before.loaded_bytes == 4 * after.planned_bytes
    assert after.planned_bytes < LAYERS * 4 * MIB + 4 * MIB
    assert after.misses == before.misses


def test_other_streams_wait_for_their_pages(reference):
    state, _, x, wanted = reference
    manager = manager_of(state)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    with torch.no_grad(), manager.use("m") as model:
        outputs = []
        for i in range(12):
            with torch.cuda.stream(streams[i % 3]):
                outputs.append(model(x))
        torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in outputs)


def test_the_host_runs_ahead_of_the_device_and_nothing_is_overwritten_too_early(reference):
    state, _, x, wanted = reference
    manager = manager_of(state)
    with torch.no_grad(), manager.use("m") as model:
        outputs = []
        for _ in range(10):
            torch.cuda._sleep(20_000_000)
            outputs.append(model(x))
        torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in outputs)


def test_weights_are_read_between_passes(reference, tmp_path):
    state, plain, x, wanted = reference
    manager = manager_of(state)
    with torch.no_grad(), manager.use("m") as model:
        for _ in range(3):
            assert torch.equal(model(x), wanted)
        for i in (0, 9, 15):
            assert torch.equal(model[i].weight.cpu(), state[f"{i}.weight"])
            assert torch.equal(model[i].weight.sum(0), plain[i].weight.sum(0))
            assert torch.equal(x @ model[i].weight.T[:, 5:9], x @ plain[i].weight.T[:, 5:9])
        view = model[4].weight.detach()[3]
        save_file(model.state_dict(), tmp_path / "m.safetensors")
        assert torch.equal(model(x), wanted)
        assert torch.equal(view, plain[4].weight[3])
        for name, value in model.state_dict().items():
            assert torch.equal(value.cpu(), state[name])


def test_changes_survive_eviction_and_gradients_are_those_of_the_resident_model(reference):
    state, _, x, _ = reference
    plain = stack()
    plain.load_state_dict(state)
    plain.cuda()
    manager = manager_of(state)
    with manager.use("m") as model:
        for each in (plain, model):
            optimizer = torch.optim.SGD(each.parameters(), 0.01, foreach=False)
            for _ in range(3):
                optimizer.zero_grad()
                each(x).square().mean().backward()
                optimizer.step()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        model.zero_grad()
    with torch.no_grad(), manager.use("m") as model:
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("host", ["mapped", "stream"])
def test_other_host_tiers(reference, host, tmp_path):
    state, _, x, wanted = reference
    save_file(state, tmp_path / "m.safetensors")
    manager = penstock.MemoryManager(
        cap="24MiB",
        device="cuda",
        pager="frames",
        page_size="2MiB",
        host=host,
        host_budget="32MiB",
        verify=True,
    )
    manager.register("m", stack, tmp_path / "m.safetensors")
    with torch.no_grad(), manager.use("m") as model:
        for _ in range(5):
            assert torch.equal(model(x), wanted)
        memory = manager.stats().models["m"].memory
    # Mapping is refused by some systems; then the weights are pinned.
    assert memory.host_tier in ({"mapped", "pinned"} if host == "mapped" else {"stream"})
    if memory.host_tier == "stream":
        assert memory.pinned_bytes <= 32 * MIB


# ---- capture -----------------------------------------------------------------------------------


def captured_resident(plain, x):
    static = x.clone()
    with torch.no_grad():
        for _ in range(3):
            plain(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = plain(static)

    def replay(value):
        static.copy_(value)
        graph.replay()
        return out.clone()

    return replay


@pytest.mark.parametrize("cap", ["24MiB", "48MiB"])
def test_replay_is_bit_identical_to_the_captured_resident_model(reference, cap):
    state, plain, x, _ = reference
    resident = captured_resident(plain, x)
    manager = manager_of(state, cap)
    with torch.no_grad(), manager.use("m") as model:
        captured = manager.capture("m", x)
        planned = manager.stats().models["m"].memory.planned_bytes
        assert captured.loaded_bytes == planned > 0  # what stays is not loaded again
        for seed in range(6):
            value = torch.randn(4, WIDTH, device="cuda", generator=_seeded(seed))
            assert torch.equal(captured.replay(value), resident(value))
            if seed % 2:  # eager passes between replays
                assert torch.equal(model(value), plain(value))
                assert torch.equal(model[3].weight.sum(0), plain[3].weight.sum(0))
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                out = captured.replay(value).clone()
            torch.cuda.synchronize()
            assert torch.equal(out, resident(value))
        for _ in range(20):  # without waiting for each
            captured.replay()
        assert torch.equal(captured.output, resident(value))
    assert manager.stats().peak <= manager.stats().cap


def _seeded(seed):
    return torch.Generator("cuda").manual_seed(seed)


def test_replay_after_the_plan_has_changed_is_refused(reference):
    state, _, x, wanted = reference
    manager = manager_of(state)
    with torch.no_grad(), manager.use("m") as model:
        captured = manager.capture("m", x)
        assert torch.equal(captured.replay(x), wanted)
        manager.set_cap("16MiB")
        with pytest.raises(ScheduleError, match="capture it again"):
            captured.replay(x)
        assert torch.equal(model(x), wanted)
        again = manager.capture("m", x)
        assert torch.equal(again.replay(x), wanted)
    with pytest.raises(ScheduleError, match="capture it again"):
        again.replay(x)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_by_hand_is_refused_and_the_model_runs_on(reference):
    state, _, x, wanted = reference
    manager = manager_of(state)
    with torch.no_grad(), manager.use("m") as model:
        for _ in range(3):
            model(x)
        torch.cuda.synchronize()
        with (
            pytest.raises(ScheduleError, match=r"MemoryManager\.capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            model(x)
        torch.cuda.synchronize()
        for _ in range(3):
            assert torch.equal(model(x), wanted)


def test_capture_needs_frames_and_a_steady_model(reference):
    state, _, x, _ = reference
    manager = manager_of(state, pager="managed")
    with torch.no_grad(), manager.use("m"), pytest.raises(ModelError, match="frames"):
        manager.capture("m", x)


# ---- memory ------------------------------------------------------------------------------------


def test_memory_is_the_cap_and_is_given_back(reference):
    state, _, x, wanted = reference
    gc.collect()
    manager_of(state)  # what the driver keeps for good
    gc.collect()
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    for _ in range(3):
        manager = manager_of(state)
        with torch.no_grad(), manager.use("m") as model:
            for _ in range(4):
                assert torch.equal(model(x), wanted)
            torch.cuda.synchronize()
            inside, _ = torch.cuda.mem_get_info()
            assert before - inside <= 24 * MIB + 4 * MIB
        manager.unregister("m")
        del manager, model
        gc.collect()
        torch.cuda.synchronize()
        after, _ = torch.cuda.mem_get_info()
        assert before - after <= 4 * MIB


def test_two_models_share_the_cap(reference):
    state, _, x, wanted = reference
    manager = manager_of(state, "40MiB")
    manager.register("n", stack, state)
    with torch.no_grad(), manager.use("m") as first, manager.use("n") as second:
        for _ in range(4):
            assert torch.equal(first(x), wanted)
            assert torch.equal(second(x), wanted)
    assert manager.stats().peak <= manager.stats().cap
    assert manager.stats().used_by_tag["weights"] == 0
