"""Ray's cluster: started here, for its owner alone, or joined.

GPUs are what Ray says they are, so `--num-gpus=8` on a machine without CUDA schedules like an 8-GPU node and computes on
its CPU. Stages take turns: each pool is gone before the next stage asks for devices, so none waits for another that
waits for it (spec of Ray: a GPU pipeline inside a GPU trial never ends).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from raysae.config.sections import ClusterConfig
from raysae.errors import UserError
from raysae.on_ray import given_address
from raysae.progress import say


@dataclass(frozen=True)
class Cluster:
    """The cluster in use. Sizes are asked for anew by each stage, since nodes come and go."""

    config: ClusterConfig
    dashboard: str | None = None
    started_here: bool = False
    folder: Path | None = None
    """Of Ray's session, where it was started here: sockets, logs, spilled objects. Nobody else can read it."""

    @property
    def cpus(self) -> float:
        """Ray's CPUs."""
        return float(ray.cluster_resources().get("CPU", 1))

    @property
    def gpus(self) -> int:
        """Ray's GPUs, of those as many as the config allows."""
        total = int(ray.cluster_resources().get("GPU", 0))
        return total if self.config.num_gpus is None else min(self.config.num_gpus, total)


def connect(config: ClusterConfig) -> Cluster:
    """Join the cluster that the config, the job or RAY_ADDRESS names, else start a local one.

    A local cluster's dashboard listens on 127.0.0.1 only; its other ports, which Ray binds to every interface, ask for
    Ray's token, whatever RAY_AUTH_MODE says in the shell. Its workers get the environment variables that they need
    (`needed`), and its session's folder is its owner's alone.
    """
    folder, on_sigterm = None, signal.getsignal(signal.SIGTERM)
    if not ray.is_initialized():
        address = config.address or given_address()
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address is not None:
            wait_for(address)
            try:
                with _telling(f"cluster: waiting for the Ray cluster at {address}"):
                    ray.init(address=address, **options)
            except ConnectionError as error:
                raise UserError(f"cluster.address: no Ray cluster answers at {address}: {_first_line(error)}") from None
            if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
                say(f"cluster: {address} asks for no token (RAY_AUTH_MODE): who reaches its ports can run code there")
        else:
            _ask_for_a_token()
            folder = _private_folder()
            try:
                with environment_of_workers(config.pass_env), _in_a_group_of_their_own():
                    ray.init(
                        address="local",
                        num_cpus=config.num_cpus,
                        num_gpus=config.num_gpus,
                        include_dashboard=config.dashboard,
                        dashboard_host="127.0.0.1",
                        _temp_dir=str(folder / "r"),
                        **options,
                    )
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            with contextlib.suppress(OSError):  # Ray lets everybody read it
                (Path.home() / ".ray" / "auth_token").chmod(0o600)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's exits without stopping what it started
    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    if config.num_gpus is not None and config.num_gpus > gpus:
        raise UserError(f"cluster.num_gpus: {config.num_gpus} asked, the cluster has {gpus}")
    if gpus and config.gpus_per_trial > gpus:
        raise UserError(f"cluster.gpus_per_trial: {config.gpus_per_trial:g} asked, the cluster has {gpus}")
    if config.cpus_per_trial > total.get("CPU", 0):
        raise UserError(f"cluster.cpus_per_trial: {config.cpus_per_trial:g} asked, the cluster has {total['CPU']:g}")
    url = ray.get_runtime_context().worker.node.webui_url if hasattr(ray.get_runtime_context(), "worker") else None
    return Cluster(config, f"http://{url}" if url else None, folder is not None, folder)


def disconnect(cluster: Cluster) -> None:
    """Stop the cluster if `connect` started it, and remove its session's folder unless its logs are to be kept."""
    if cluster.started_here:
        ray.shutdown()
        if cluster.folder is not None and cluster.config.keep_ray_logs:
            say(f"Ray's logs: {cluster.folder / 'r' / 'session_latest' / 'logs'}")
        elif cluster.folder is not None:
            shutil.rmtree(cluster.folder, ignore_errors=True)


ANSWER_WITHIN_S, TOLD_AFTER_S = 60.0, 10.0
"""How long a cluster may take to answer, and when the user is told that it is waited for."""


def wait_for(address: str, within: float = ANSWER_WITHIN_S, told_after: float = TOLD_AFTER_S) -> None:
    """Return once something listens at the address of a Ray cluster; UserError, one line, when nothing does in time.

    Ray itself waits for minutes, in silence, for a head that is gone. `auto` is the address that Ray has noted.
    """
    from ray._private import services

    named = address.removeprefix("ray://")
    if named == "auto":
        try:
            named = services.canonicalize_bootstrap_address("auto") or ""
        except ConnectionError:
            return  # ray.init says so at once
    host, _, port = named.rpartition(":")
    if not host or not port.isdigit():
        return  # a name that Ray may know
    began, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        waited = time.monotonic() - began
        if waited > within:
            raise UserError(
                f"cluster.address: no Ray cluster answers at {address} within {within:g} s ({reason}); start it, or unset "
                "RAY_ADDRESS to use this machine"
            )
        if waited > told_after and not told:
            told = True
            say(f"cluster: waiting for the Ray cluster at {address}, for up to {within:g} s")
        time.sleep(min(1.0, within / 10))


@contextlib.contextmanager
def _telling(message: str, after: float = TOLD_AFTER_S) -> Iterator[None]:
    """Say `message` if the block takes longer than `after` seconds."""
    timer = threading.Timer(after, say, (message,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _in_a_group_of_their_own() -> Iterator[None]:
    """Ray's processes that start in the block get a process group. A signal to the driver's, as a scheduler sends it, is
    for the driver, which stops them; if they went first, Ray's own threads could end the driver with status 1."""
    from ray._private import utils

    bind_to_driver = utils.set_kill_on_parent_death_linux

    def in_child() -> None:
        os.setpgrp()
        bind_to_driver()

    utils.set_kill_on_parent_death_linux = in_child
    try:
        yield
    finally:
        utils.set_kill_on_parent_death_linux = bind_to_driver


def _ask_for_a_token() -> None:
    """Make a cluster that starts here ask for Ray's token."""
    from ray._private.authentication.authentication_token_setup import _enable_token_auth

    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() != "token":
        say(f"cluster: RAY_AUTH_MODE={mode} is for clusters that are joined; the one that starts here asks for a token")
        _enable_token_auth()  # sets it, also in Ray, which read it when it was imported


def _private_folder() -> Path:
    """A new folder for Ray's session that only this user can enter. (Ray makes all below it everybody's.)

    Its name is short, since sockets lie below it, whose paths have 107 bytes at most.
    """
    root = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="ray-", dir=root if len(root) <= 25 else "/tmp"))


NEEDED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TERM", "TZ", "TMPDIR", "TEMP", "TMP", "PWD",
    "HOSTNAME", "VIRTUAL_ENV", "CC", "CXX", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY",
    "ALL_PROXY", "NO_PROXY",
)  # fmt: skip
NEEDED_PREFIXES = (
    "LC_", "LD_", "DYLD_", "PYTHON", "CONDA_", "RAY_", "RAYSAE_", "TUNE_", "CUDA", "NVIDIA_", "NCCL_", "ROCM", "ROCR_",
    "HIP_", "HSA_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_", "NUMEXPR_", "MALLOC_",
    "HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "XDG_", "SSL_CERT_", "WANDB_",
)  # fmt: skip
"""Of the driver's environment, what workers of a local cluster get: to run Python, find devices, load models, be logged."""


def needed(name: str, also: Sequence[str] = ()) -> bool:
    """Whether workers get this variable."""
    return name in also or name.upper() in NEEDED or name.startswith(NEEDED_PREFIXES)


@contextlib.contextmanager
def environment_of_workers(also: Sequence[str] = ()) -> Iterator[None]:
    """The environment as processes that start in the block shall see it. Ray's log holds what its libraries hand on."""
    hidden = {name: value for name, value in os.environ.items() if not needed(name, also)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
