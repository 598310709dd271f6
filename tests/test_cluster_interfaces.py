"""The interface of an address, on this machine's own."""

import os
import socket

import pytest
import ray
from ray.train.torch import TorchConfig

from pipeline.cluster.interfaces import NodeTorchConfig, interface_of, use_node_interface


def test_the_interface_of_an_address_is_found() -> None:
    loopback = interface_of("127.0.0.1")
    assert loopback in {name for _, name in socket.if_nameindex()}
    assert interface_of("203.0.113.7") is None  # an address for documents, that no machine has


def test_gloo_is_told_once_and_a_user_s_word_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    use_node_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_node_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == interface_of("127.0.0.1")


def test_it_is_ray_s_own_backend_with_one_thing_more() -> None:
    config = NodeTorchConfig(timeout_s=7)
    assert isinstance(config, TorchConfig) and config.timeout_s == 7
    assert issubclass(config.backend_cls, TorchConfig().backend_cls)
