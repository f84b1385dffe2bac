"""Several models under one cap on a real GPU, by threads too."""

import threading

import pytest
import torch
from torch import nn

import penstock

pytestmark = pytest.mark.gpu

MIB = 1 << 20
WIDTH = 1024  # a layer is 4 MiB


def stack(layers):
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))).eval()


class House:
    def __init__(self, pager, cap, **layers):
        self.manager = penstock.MemoryManager(
            cap=cap * MIB, device="cuda", pager=pager, page_size="2MiB"
        )
        self.x = torch.linspace(-1, 1, 2 * WIDTH, device="cuda").view(2, WIDTH)
        self.wanted = {}
        for seed, (name, count) in enumerate(layers.items()):
            torch.manual_seed(seed)
            plain = stack(count)
            state = {key: value.clone() for key, value in plain.state_dict().items()}
            with torch.no_grad():
                self.wanted[name] = plain.cuda()(self.x)
            self.manager.register(name, lambda count=count: stack(count), state)

    def held(self, name):
        self.manager.pager.synchronize()
        return self.manager.stats().models[name].memory.resident_bytes // MIB

    def check(self, name, module):
        with torch.no_grad():
            assert torch.equal(module(self.x), self.wanted[name])

    def use(self, name, passes=3):
        with self.manager.use(name) as module:
            for _ in range(passes):
                self.check(name, module)


@pytest.fixture(params=["managed", "frames"])
def pager(request):
    return request.param


def test_kept_reserved_and_guests(pager):
    house = House(pager, 96, main=8, encoder=4, big=40)
    house.manager.reserve("main")
    with house.manager.keep_resident("encoder"):
        for _ in range(3):
            house.use("encoder")
            with house.manager.guest("big") as module:
                house.check("big", module)
                assert (house.held("main"), house.held("encoder")) == (32, 16)
            house.use("main")
    memory = house.manager.stats().models
    assert memory["main"].memory.loaded_bytes == 32 * MIB
    assert memory["encoder"].memory.loaded_bytes == 16 * MIB
    assert house.manager.stats().peak <= 96 * MIB


def test_a_model_inside_the_call_of_another(pager):
    house = House(pager, 48, outer=10, inner=10)
    with house.manager.use("outer") as outer:
        for _ in range(4):
            house.check("outer", outer)
        handle = outer[5].register_forward_pre_hook(lambda *_: house.use("inner"))
        for _ in range(3):
            house.check("outer", outer)
        handle.remove()
        house.check("outer", outer)
    assert house.manager.stats().peak <= 48 * MIB


def test_threads_share_models(pager):
    house = House(pager, 72, a=12, b=12)
    errors = []

    def work(seed):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                house.x.record_stream(torch.cuda.current_stream())
                for turn in range(6):
                    house.use("ab"[(seed + turn) % 2])
        except BaseException as error:
            errors.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not errors, errors[0]
    assert house.manager.stats().used <= house.manager.stats().cap
