"""What dinofast raises when an input cannot be used: every message names the thing and the remedy."""


class DinofastError(Exception):
    """Base of all errors that dinofast raises on purpose."""


class InputError(DinofastError, ValueError):
    """An argument, image, volume or array cannot be used as given."""


class BadFilesError(InputError):
    """Some files of a data set cannot be read.

    Attributes:
        files: path of each bad file -> what is wrong with it.
    """

    def __init__(self, files: dict[str, str], remedy: str) -> None:
        self.files = dict(files)
        listing = "\n".join(f"  {path}: {reason}" for path, reason in self.files.items())
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        super().__init__(f"{count} cannot be used:\n{listing}\n{remedy}")


class KernelError(DinofastError, RuntimeError):
    """No kernel can compute an operator for these arguments, or not with the forced backend."""


class ArtifactError(DinofastError):
    """A saved detector, model or bank is torn, foreign, newer than this package, or does not belong here."""


class BackboneError(DinofastError):
    """Backbone weights are missing, gated, unreachable or not what they claim to be."""
