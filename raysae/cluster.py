"""Where work runs: the one place that decides between CPU and CUDA, sizes pools, and starts or joins Ray.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from raysae.config import ClusterConfig
from raysae.errors import UserError
from raysae.progress import say


def _address() -> str | None:
    """The cluster that `ray job submit` or the user put in the environment."""
    return os.environ.get("RAY_ADDRESS") or ("auto" if os.environ.get("RAY_JOB_ID") else None)


# Ray reads these when it is first imported, so they are set here, before any on_ray module imports it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end a sweep early as if it were whole
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's classic reporter can be told which columns to show
# glibc's, for the worker processes: keep freed tensors instead of giving their pages back to the kernel, which zeroes them
# anew at each step (a fifth of the CPU time of a step at d_sae 6144, batch 2048).
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
if _address() is None:  # a cluster that is joined has its own
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else each actor pool prints Ray's issue 53727


@dataclass(frozen=True)
class Placement:
    """How many workers of a stage run at once, and what each of them holds and uses."""

    workers: int
    cpus: float
    gpus: float
    threads: int
    """torch threads of a worker."""

    def held(self, seconds: float) -> dict[str, float]:
        """CPU- and GPU-seconds that all workers hold together in so many seconds."""
        return {"cpu_seconds": seconds * self.workers * self.cpus, "gpu_seconds": seconds * self.workers * self.gpus}


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
        import ray

        return float(ray.cluster_resources().get("CPU", 1))

    @property
    def gpus(self) -> int:
        """Ray's GPUs, of those as many as the config allows."""
        import ray

        total = int(ray.cluster_resources().get("GPU", 0))
        return total if self.config.num_gpus is None else min(self.config.num_gpus, total)

    @cached_property
    def device_bytes(self) -> float | None:
        """Memory of a GPU, asked of one in a task, since a driver touches none; None without CUDA."""
        return at_once(_device_bytes, [()], Placement(1, 0.0, 1.0, 1))[0][1] if self.gpus else None

    def capture(self, blocks: int) -> Placement:
        """Hosts of the model: see `place_hosts`."""
        return place_hosts(self.cpus, self.gpus, self.config.capture_actors, blocks)

    def trials(self) -> Placement:
        """Trials of the sweep: see `place_trials`."""
        return place_trials(self.cpus, self.gpus, self.config.cpus_per_trial, self.config.gpus_per_trial)


def place_hosts(cpus: float, gpus: int, wanted: int | None, blocks: int) -> Placement:
    """One host per GPU; without GPUs, `wanted` hosts or one, sharing all CPUs' threads. Never more hosts than blocks.

    A host holds half a logical CPU at most: the tasks that read its blocks need a share as well, also when a lost node
    has left the pool with a single CPU; a pool that holds all of them never reads.
    """
    if gpus:
        workers = min(wanted or gpus, gpus, max(blocks, 1))
        return Placement(workers, min(0.5, cpus / (2 * gpus)), 1.0, max(1, int(cpus // gpus)))
    workers = max(1, min(wanted or 1, int(cpus), max(blocks, 1)))
    return Placement(workers, 0.5, 0.0, max(1, int(cpus // workers)))


def place_trials(cpus: float, gpus: int, cpus_per_trial: float, gpus_per_trial: float) -> Placement:
    """Trials packed by GPU share where there are GPUs, by CPU share otherwise."""
    if gpus:
        workers = max(1, int(gpus / gpus_per_trial))
        share = min(cpus_per_trial, cpus / workers)
        return Placement(workers, share, gpus_per_trial, max(1, int(share)))
    return Placement(max(1, int(cpus / cpus_per_trial)), cpus_per_trial, 0.0, max(1, int(cpus_per_trial)))


PACK_AT_MOST = 8
"""SAEs in a pack: more have nothing left to share, and a search learns nothing while a pack trains."""
BATCH_SHARE = 0.1
"""What reading a batch once for a pack counts, beside an SAE's step on it."""
MEMORY_SHARE = 0.8
"""Of a device's memory, what a pack may plan on; the rest is the context's and the allocator's."""


def pack_size(
    saes: Sequence[int], placement: Placement, d_in: int, d_sae: int, batch_size: int, memory: float | None
) -> int:
    """SAEs in a trial: every device busy first, then packs as large as pay.

    saes: how many at each site, since a pack is of one. d_in, d_sae: of the largest. memory: bytes of a device, if known.
    On CPUs 1: there a pack gains nothing. Among the sizes that leave no trial's place empty, that of the least time until
    the last pack ends, rounds · (size + BATCH_SHARE), the larger of equals. A pack holds weights, gradients and Adam's
    moments (16 bytes a parameter) of each SAE, and three [batch, d_sae] tensors of one.
    """
    if not placement.gpus:
        return 1
    most = PACK_AT_MOST
    if memory is not None:
        room = MEMORY_SHARE * memory * min(placement.gpus, 1.0) - 12 * batch_size * d_sae
        most = min(most, int(room // (16 * (2 * d_in * d_sae + d_in + d_sae))))

    def packs(size: int) -> int:
        return sum(-(-n // size) for n in saes)

    def seconds(size: int) -> float:
        return -(-packs(size) // placement.workers) * (size + BATCH_SHARE)

    busy = min(placement.workers, sum(saes))
    fitting = [size for size in range(1, most + 1) if packs(size) >= busy]
    return min(fitting, key=lambda size: (round(seconds(size), 6), -size), default=1)


def device() -> torch.device:
    """The device of this worker. Ray sets CUDA_VISIBLE_DEVICES, so device 0 is its own."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_bytes() -> float | None:
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def at_once(
    work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], placement: Placement
) -> list[tuple[float, Any]]:
    """`work(*a)` for each `a` of `arguments`, all at once, each in a process with the share of a worker of `placement`.

    Returns, in their order, (seconds from asking until it began, result). The cluster must be connected.
    """
    import ray

    def task(asked: float, given: tuple[Any, ...]) -> tuple[float, Any]:
        began = max(time.time() - asked, 0.0)
        torch.set_num_threads(placement.threads)
        return began, work(*given)

    remote = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus, max_retries=0)(task)
    return ray.get([remote.remote(time.time(), given) for given in arguments])


def connect(config: ClusterConfig) -> Cluster:
    """Join the cluster that the config, the job or RAY_ADDRESS names, else start a local one.

    A local cluster's dashboard listens on 127.0.0.1 only; its other ports, which Ray binds to every interface, ask for
    Ray's token, whatever RAY_AUTH_MODE says in the shell. Its workers get the environment variables that they need
    (`needed`), and its session's folder is its owner's alone.
    """
    import ray

    folder, on_sigterm = None, signal.getsignal(signal.SIGTERM)
    if not ray.is_initialized():
        address = config.address or _address()
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
                with environment_of_workers(config.pass_env):
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
        import ray

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


def output_root(path: Path, given: bool) -> Path:
    """The absolute output root; refuses a relative one inside a job's temporary folder, where results would be lost."""
    if not given and os.environ.get("RAYSAE_OUTPUT"):
        path = Path(os.environ["RAYSAE_OUTPUT"]).expanduser()
    if not path.is_absolute() and "_ray_pkg_" in str(Path.cwd()):
        raise UserError(
            f"output: {path} is relative, inside the job's temporary folder; give an absolute one "
            "(--output or RAYSAE_OUTPUT)"
        )
    path = path.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"output: {there} is not a folder; give another (--output or RAYSAE_OUTPUT)")
    for folder in (there, path / "stages"):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"output: {folder} cannot be written to; give one that is yours (--output or RAYSAE_OUTPUT)")
    return path


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
