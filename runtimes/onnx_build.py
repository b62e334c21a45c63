"""Which build of ONNX Runtime is installed, asked of the package's metadata: the library itself takes a while to load."""

from importlib.metadata import PackageNotFoundError, version

from data.errors import InputError

BUILDS = ("onnxruntime", "onnxruntime-gpu")


def installed_builds() -> dict[str, str]:
    """Versions of the builds that are installed, by package."""
    found = {}
    for name in BUILDS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_one_build() -> None:
    """Raise InputError where both onnxruntime and onnxruntime-gpu are installed: their files overwrite each other."""
    if len(installed_builds()) > 1:
        raise InputError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "uninstall both, then install the one that is wanted (make clean, then make test or make GPU=1 test)"
        )
