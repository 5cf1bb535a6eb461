"""Trained models that come with the package, and others by name: ``gaudi_jax.load("zoo:NAME")``.

Each is a folder that ``python -m gaudi_jax.zoo publish`` wrote; ``python -m gaudi_jax.zoo list``
prints them.
"""

from pathlib import Path

from gaudi_jax.errors import UserError
from gaudi_jax.models.pretrained import resolve_folder

#: Of a published model: what it is, and what it can.
CARD_FILE = "card.json"
ZOO, HUB = "zoo:", "hf:"
MODELS = Path(__file__).parent / "models"


def names() -> list[str]:
    """The models that come with the package.

    Example:
        >>> from gaudi_jax.zoo import names
        >>> "digits-vit-gaudi" in names()
        True
    """
    return sorted(path.parent.name for path in MODELS.glob(f"*/{CARD_FILE}"))


def published_folder(source: str | Path) -> Path | None:
    """The folder of a published model, or None if the source does not name one.

    Args:
        source: ``zoo:NAME`` of a model in the package, ``hf:OWNER/NAME`` of one on the Hugging Face
            hub, or a directory.

    Raises:
        UserError: there is no such model, or the hub's is none that was published here.

    Example:
        >>> from gaudi_jax.zoo import published_folder
        >>> published_folder("zoo:digits-vit-gaudi").name, published_folder("runs/digits")
        ('digits-vit-gaudi', None)
    """
    text = str(source)
    if text.startswith(ZOO):
        name = text.removeprefix(ZOO)
        if name not in names():
            raise UserError(f"the zoo has no model {name!r}; use one of {', '.join(names())}")
        return MODELS / name
    folder = resolve_folder(text.removeprefix(HUB)) if text.startswith(HUB) else Path(source)
    if (folder / CARD_FILE).is_file():
        return folder
    if text.startswith(HUB):
        raise UserError(
            f"{text} holds no {CARD_FILE}; read models of transformers with "
            "gaudi_jax.models.ViT.from_pretrained or GPT2.from_pretrained"
        )
    return None
