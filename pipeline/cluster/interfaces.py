"""The network interface over which workers on several machines talk with gloo."""

import contextlib
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's own, with one thing done before."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class NodeTorchConfig(TorchConfig):
    """Ray's torch backend, with gloo on the interface that has the node's address.

    By itself gloo takes what the host's name resolves to, which on Debian and Ubuntu is a loopback address that no
    other machine reaches. GLOO_SOCKET_IFNAME in the environment of `ray start` wins over this. NCCL looks for itself.
    """

    @property
    def backend_cls(self) -> type:
        return _Backend


def use_node_interface() -> None:
    """Tells gloo in this process which interface has the address under which Ray knows this node."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The interface with this IPv4 address; None where none has it (behind NAT), and gloo's own choice stays."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
