"""The front ends under a hard cap, each scene a process: `python front_end_scenes.py NAME`."""

import gc
import sys
import tempfile
from pathlib import Path

import torch
from scenes import driver_used, held_by_others

import penstock
from penstock.cap.process import current_cap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

GIB = 1 << 30
MIB = 1 << 20


def check_cap(others):
    stats = penstock.memory_stats()
    assert stats.peak <= stats.cap, str(stats)
    used = driver_used() - others
    assert used <= stats.cap, f"{used} bytes by the driver, {stats}"


def cache():
    """Keys and values are counted, as activations, and leave when they are let go of."""
    from penstock.integrations import transformers as front_end
    from python.integrations.transformers_zoo import kinds, save

    penstock.set_cap(2 * GIB, page_size="2MiB")
    others = held_by_others(current_cap("cuda"))
    with tempfile.TemporaryDirectory() as directory:
        save(kinds(4)["llama"], Path(directory), deviation=0.1)
        model = front_end.load(directory, device="cuda")
        ids = (torch.arange(4 * 512).view(4, 512) * 7 % 97 + 1).cuda()
        with torch.no_grad():
            for _ in range(3):
                model(ids)
            gc.collect()
            before = penstock.memory_stats()
            kept = model(ids, use_cache=True).past_key_values
            after = penstock.memory_stats()
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
        assert nbytes >= 8 * MIB
        grown = after.activations - before.activations
        assert nbytes <= grown <= nbytes + 4 * MIB, f"{nbytes} of keys and values, {grown} counted"
        assert after.weights > 0
        check_cap(others)
        del kept
        gc.collect()
        left = penstock.memory_stats().activations - before.activations
        assert left <= 1 * MIB, f"{left} bytes are left"


def pipelines():
    """Pipelines draw what they draw in ordinary memory, all of it under one cap."""
    from penstock.integrations import diffusers as front_end
    from python.integrations.diffusers_zoo import KINDS, draw, make

    penstock.set_cap(3 * GIB, page_size="2MiB")
    others = held_by_others(current_cap("cuda"))
    torch.backends.cudnn.deterministic = True
    for name in KINDS:
        with tempfile.TemporaryDirectory() as directory:
            plain = make(name)
            plain.save_pretrained(directory)
            plain.to("cuda")
            wanted = draw(plain, name)
            same = torch.equal(draw(plain, name), wanted)
            del plain
            pipeline = front_end.load(directory, device="cuda")
            for _ in range(2):
                found = draw(pipeline, name)
                assert not same or torch.equal(found, wanted), f"{name} differs"
            check_cap(others)
            del pipeline
            gc.collect()


if __name__ == "__main__":
    {"cache": cache, "pipelines": pipelines}[sys.argv[1]]()
    print("done")
