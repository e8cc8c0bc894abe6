"""How many GPUs a run sees, how many ranks they get, and a GPU that torch cannot use."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_tide import gpus
from megatron_tide.gpus import fitting_ranks, refuse_idle_gpu, seen_of
from megatron_tide.machine import device_of
from megatron_tide.train import distributed
from megatron_tide.train.network import interface_towards, loopback_store, matching, name_interface

FOUR = [f"GPU {number}: NVIDIA A100-SXM4-40GB (UUID: GPU-{number}aaa)" for number in range(4)]
DIVIDED = [FOUR[0], *(f"  MIG 3g.20gb     Device  {number}: (UUID: MIG-{number}bbb)" for number in range(2)), FOUR[1]]


@pytest.mark.parametrize(
    ("listed", "chosen", "seen"),
    [
        (FOUR, None, 4),
        (FOUR, "2,0", 2),
        (FOUR, "GPU-0aaa, GPU-1aaa,GPU-3aaa", 3),
        (FOUR, "0,7,1", 1),  # CUDA stops at one that does not exist
        (FOUR, "", 0),
        (FOUR, "-1", 0),
        (FOUR, "NoDevFiles", 0),
        (DIVIDED, None, 1),
        (DIVIDED, "MIG-0bbb,MIG-1bbb", 1),
        ([], None, 0),
        ([], "0,1", 0),
    ],
)
def test_gpus_are_counted_as_cuda_shows_them(listed: list[str], chosen: str | None, seen: int) -> None:
    assert seen_of(listed, chosen) == seen


def test_as_many_ranks_as_divide_the_batch() -> None:
    assert [fitting_ranks(gpus, 64, 4) for gpus in (0, 1, 3, 6, 8, 16)] == [1, 1, 2, 4, 8, 16]
    assert fitting_ranks(8, batch=8, micro_batch=8) == 1  # the quickstart
    assert fitting_ranks(8, 64, 4, nodes=4) == 4


def test_a_gpu_that_torch_cannot_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it")

    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidiactl", "nvidia-uvm"):  # of the driver, not a GPU
        (tmp_path / name).touch()
    refuse_idle_gpu()
    (tmp_path / "nvidia0").touch()
    for refused in (refuse_idle_gpu, lambda: device_of("auto")):
        with pytest.raises(
            ValueError, match=r"nvidia0 is a GPU.*too old \(found version 11040\)\).*DEVICES= \(empty\)"
        ):
            refused()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        refuse_idle_gpu()
        assert device_of("auto") == "cpu"


@pytest.mark.parametrize(("local", "seen", "taken"), [("3", 4, 3), ("5", 1, 0), ("0", 1, 0)])
def test_a_ranks_gpu(monkeypatch: pytest.MonkeyPatch, local: str, seen: int, taken: int) -> None:
    """With --gpus-per-task a rank sees one GPU, which is its number 0 whatever the rank's own number."""
    chosen: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    distributed._take_gpu()
    assert chosen == [taken]
    assert os.environ["LOCAL_RANK"] == str(taken)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2 .* sees 2 GPUs: start at most 2 ranks per node"):
        distributed._take_gpu()


def test_ranks_that_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    world = SimpleNamespace(device=None, gather_on_all=lambda mine: [mine, "node2, GPU aaa", mine])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="aaa"))
    with pytest.raises(ValueError, match=r"ranks \[0, 2\] share one GPU \(.*, GPU aaa\): start one rank per GPU"):
        distributed._refuse_shared_gpus(world)  # type: ignore[arg-type]
    world.gather_on_all = lambda mine: [mine, "node2, GPU aaa"]
    distributed._refuse_shared_gpus(world)  # type: ignore[arg-type]


def test_gloos_interface_is_named_as_nccls() -> None:
    names = ["lo", "eth0", "ib0", "ib1", "docker0"]
    assert matching("ib", names) == ["ib0", "ib1"]
    assert matching("=ib1,eth0", names) == ["eth0", "ib1"]
    assert matching("^docker,lo", names) == ["eth0", "ib0", "ib1"]
    assert matching("^=ib0", names) == ["lo", "eth0", "ib1", "docker0"]
    assert matching("", names) == names
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no such host.invalid") is None


@pytest.mark.parametrize(
    ("address", "size", "here", "moved"),
    [
        ("a-node.invalid", "2", "2", True),
        ("a-node.invalid", "1", None, True),
        ("localhost", "2", None, True),
        ("a-node.invalid", "2", "1", False),
        ("a-node.invalid", "2", None, False),
    ],
)
def test_ranks_of_one_machine_meet_on_it_whatever_it_is_called(
    monkeypatch: pytest.MonkeyPatch, address: str, size: str, here: str | None, moved: bool
) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "MASTER_PORT", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    environment = {"RANK": "0", "WORLD_SIZE": size, "MASTER_ADDR": address}
    for name, value in {**environment, **({"LOCAL_WORLD_SIZE": here} if here else {})}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    store = loopback_store()
    assert (store is not None) == moved
    assert os.environ["MASTER_ADDR"] == ("127.0.0.1" if moved else address)
    if store is not None:
        assert (store.host, store.port) == ("127.0.0.1", int(os.environ["MASTER_PORT"]))
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
        with pytest.raises(OSError, match=r"MASTER_PORT=\d+: .*in use; set another one"):
            loopback_store()


def test_an_open_store_of_torchrun_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**given, "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    assert loopback_store() is None
    assert capsys.readouterr().err.startswith("warning: torchrun's port 29500 is open on every network interface")


def test_a_port_that_there_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "99999")
    with pytest.raises(ValueError, match=r"^MASTER_PORT=99999 in the environment: no port has this number"):
        distributed.launched_ranks()


def test_ranks_that_do_not_find_each_other_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    def waits(**_: object) -> None:
        raise torch.distributed.DistStoreError("Timed out: 1/2 clients joined.\nframe #0: c10")

    monkeypatch.setattr(deepspeed, "init_distributed", waits)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match=r"^rank 1 of 2: .* at 127.0.0.1, port 7 \(Timed out: 1/2 clients joined.\); see"):
        distributed._form_group("gloo")


def test_several_nodes_get_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, ranks, named in (("127.0.0.1", "2", None), ("127.0.0.11", "1", None), ("127.0.0.11", "2", "lo")):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("WORLD_SIZE", ranks)
        name_interface()
        assert os.environ.get("GLOO_SOCKET_IFNAME") == named
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0"
