"""How a table is to be read: which columns mean what, from the data root or ``catalogue.yaml``, or by known shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from spn4cir.config import read_settings
from spn4cir.errors import InputError
from spn4cir.files import short

SETTINGS = "catalogue.yaml"
COLUMN_ROLES = ("image", "id", "caption", "category", "title", "reference", "target", "modification", "negatives")
_SETTING_OF = {"targets": "target", "texts": "modification"}  # of roles that a table of triplets calls otherwise
_FLAGS = {"true": True, "false": False}
_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class TableSettings:
    """How the tables of a data root are read; None leaves it to the names of the columns.

    Args:
        table: the table below the data root, which is then a folder; * stands for any letters, as for several tables.
        image: column of paths, names of files or names without suffix; or a template such as {article_id:0>10}.jpg.
        id: column of ids.
        caption, category, title: columns; of several, such as Title|Body, all are captions, or the first that says
            something is the category or the title.
        reference, target, modification, negatives: columns of a table of triplets.
        same: column; rows that agree in it have the same caption, category and title where they have none.
        captions: file of captions beside pictures.
        encoding: of text tables, such as gb18030; None finds UTF-8, UTF-16 and cp1252.
        join_last: whether separators too many in a row belong to the text in its last column.
        complete: whether a line with fewer fields than the head line is an error; the cells it lacks are empty else.
        strict: whether a line that may be read in two ways is an error, instead of a note.
    """

    table: str | None = None
    image: str | None = None
    id: str | None = None
    caption: str | None = None
    category: str | None = None
    title: str | None = None
    reference: str | None = None
    target: str | None = None
    modification: str | None = None
    negatives: str | None = None
    same: str | None = None
    captions: str | None = None
    encoding: str | None = None
    join_last: bool = False
    complete: bool = False
    strict: bool = False

    def names_of(self, role: str, usual: Sequence[str]) -> Sequence[str]:
        """Names that the column of a role may have, in lower case: the given one alone, or the usual ones."""
        given = getattr(self, _SETTING_OF.get(role, role), None)
        return (given.strip().lower(),) if given else usual

    def is_given(self, role: str) -> bool:
        """Whether the column of a role was named."""
        return getattr(self, _SETTING_OF.get(role, role), None) is not None

    @property
    def template(self) -> str | None:
        """The template of paths, if ``image`` is one."""
        return self.image if self.image and "{" in self.image else None

    def key_names(self, usual: Sequence[str]) -> list[Sequence[str]]:
        """Columns that a row must fill to hold an image: names that each may have."""
        if self.template:
            return [(name.lower(),) for name in template_columns(self.template)]
        return [self.names_of("image", usual)]


KNOWN: Mapping[str, tuple[tuple[str, ...], TableSettings]] = {
    "Fashion Product Images (Kaggle)": (
        ("id", "mastercategory", "articletype", "productdisplayname"),
        TableSettings(
            image="{id}.jpg", id="id", title="productDisplayName", category="articleType", join_last=True
        ),
    ),
    "H&M": (
        ("article_id", "prod_name", "detail_desc"),
        TableSettings(
            image="{article_id:0>10}.jpg", id="article_id", title="prod_name", caption="detail_desc",
            category="product_type_name",
        ),
    ),
    "Shopify": (
        ("handle", "title", "body (html)", "image src"),
        TableSettings(image="Image Src", title="Title", caption="Body (HTML)", category="Type", same="Handle"),
    ),
    "WooCommerce": (
        ("id", "sku", "name", "images"),
        TableSettings(
            image="Images", id="ID", title="Name", caption="Short description|Description", category="Categories"
        ),
    ),
    "Amazon Berkeley Objects": (
        ("item_id", "item_name", "main_image_id"),
        TableSettings(
            image="main_image_id", id="item_id", title="item_name", caption="item_name|bullet_point",
            category="product_type",
        ),
    ),
    "Flickr30k": (("image_name", "comment_number", "comment"), TableSettings(image="image_name", caption="comment")),
    "LAION": (("url", "text"), TableSettings(image="URL", caption="TEXT")),
}  # fmt: skip
"""Tables that are known by columns that they all have: what is read of each where no column is named."""


def known_shape(names: Sequence[str], settings: TableSettings) -> tuple[str, TableSettings]:
    """The name of a known shape of table, empty if it is none or columns were named; and the settings to read it by."""
    if any(settings.is_given(role) for role in COLUMN_ROLES):
        return "", settings
    there = {name.strip().lower() for name in names}
    for shape, (columns, known) in KNOWN.items():
        if there.issuperset(columns):
            kept = {f.name: getattr(known, f.name) for f in fields(known) if getattr(known, f.name) is not None}
            own = {name: kept[name] for name in kept if name not in ("table", "captions", "encoding", "strict")}
            own["join_last"] = known.join_last or settings.join_last
            missing = [role for role in ("caption", "category", "title", "same") if _lacks(own.get(role), there)]
            return shape, replace(settings, **{**own, **dict.fromkeys(missing)})
    return "", settings


def _lacks(given: object, there: set[str]) -> bool:
    return isinstance(given, str) and not any(name.strip().lower() in there for name in given.split("|"))


def template_columns(template: str) -> list[str]:
    """Names of the columns in a template. Raises ``InputError`` if it is none."""
    names = [part.partition(":")[0].strip() for part in _FIELD.findall(template)]
    rest = _FIELD.sub("", template)
    if not names or not all(names) or "{" in rest or "}" in rest:
        raise InputError(f"image={template}: a template holds columns in braces, such as {{article_id:0>10}}.jpg")
    return names


def fill_template(template: str, cell: Callable[[str], str]) -> str:
    """A path of a template and the cells of a row; what follows a colon is Python's format of a text.

    Raises ``InputError`` for a format that is none.
    """

    def fill(found: re.Match[str]) -> str:
        name, _, how = found[1].partition(":")
        value = cell(name.strip()).strip()
        try:
            return format(value, how)
        except ValueError:
            raise InputError(
                f"image={template}: {how!r} is no format of a text; 0>10 fills up to 10 by zeros"
            ) from None

    return _FIELD.sub(fill, template)


def split_place(place: str) -> tuple[str, TableSettings]:
    """The place in ``PLACE?image=Image Src,caption=Title,strict=true``, and its settings, if it has any.

    A place that exists, whatever its name, has none. A value ends where a comma and the name of a setting follow.
    Raises ``InputError`` for an unknown setting.
    """
    if "?" not in place or Path(place).exists():
        return place, TableSettings()
    where, _, given = place.rpartition("?")
    names = "|".join(field.name for field in fields(TableSettings))
    values: dict[str, Any] = {}
    for part in re.split(rf",\s*(?=(?:{names})\s*=)", given):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise InputError(
                f"{place}: {short(part)} is no setting: write NAME=VALUE with a NAME of {names}".replace("|", ", ")
            )
        if name in values:
            raise InputError(f"{place}: {name} is given twice")
        values[name] = value
    return where, _checked(place, values)


def read_place(place: str) -> tuple[str, TableSettings]:
    """The folder, table or hub name that a data root means, and how to read it.

    That is what ``split_place`` says, over the settings in ``catalogue.yaml``, which is the data root itself, or lies
    in that folder. Raises ``InputError`` that names the file and the setting.
    """
    where, given = split_place(place)
    path = Path(where)
    file = path if path.suffix.lower() in (".yaml", ".yml") else path / SETTINGS
    if file.is_file():
        of_file = _checked(str(file), read_settings(file, TableSettings))
        told = {f.name: value for f in fields(given) if (value := getattr(given, f.name)) not in (None, False)}
        where, given = str(file.parent), replace(of_file, **told)
    return where, given


def _checked(place: str, values: Mapping[str, Any]) -> TableSettings:
    """Settings whose values are texts, and true or false. Raises ``InputError`` for others."""
    known = {field.name: field.default for field in fields(TableSettings)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{place}: there is no setting {short(name)}; known: {', '.join(known)}")
        if isinstance(known[name], bool):
            flag = _FLAGS.get(str(value).lower())
            if flag is None:
                raise InputError(f"{place}: {name} is true or false, got {short(value)}")
            checked[name] = flag
        elif isinstance(value, list) and value and name in ("caption", "category", "title"):
            checked[name] = "|".join(map(str, value))
        elif value is None or (isinstance(value, str) and value.strip()):
            checked[name] = value
        else:
            raise InputError(f"{place}: {name} is a text, got {short(value)}")
    settings = TableSettings(**checked)
    if settings.template:
        template_columns(settings.template)
    return settings
