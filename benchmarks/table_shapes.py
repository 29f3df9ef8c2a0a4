"""Small tables of the shapes that people have, written as their programs write them, with what each must be read as."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

THINGS = ("mug", "lamp", "bowl", "vase")
COLORS = ("red", "blue", "green", "yellow", "black", "white")
NAMES = [f"{color} ceramic {thing}" for thing in THINGS for color in COLORS]
CDN = "https://cdn.example.com/s/files/1/0001/products"


@dataclass
class Shape:
    """A table in memory.

    Args:
        file: path of the table below its folder.
        place: data root below the folder, or settings behind the folder; empty for the table itself.
        pictures: paths of the pictures below the folder.
        rows: of a text table, the head line first; of JSON lines, objects.
        separator: of a text table.
        ids: image ids that must be read, in order.
        captions: of the first image.
        title, category: of the first image.
        content: what is written in the place of ``rows``.
        others: further files by their paths.
        image_rows: number of rows that hold an image.
    """

    file: str
    pictures: list[str]
    ids: list[str]
    captions: tuple[str, ...]
    image_rows: int
    rows: list[Any] = field(default_factory=list)
    separator: str = ","
    place: str = ""
    title: str = ""
    category: str = ""
    content: bytes = b""
    others: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path, is_empty: bool = False) -> str:
        """Write the pictures, empty files or real ones, and the table; return the data root."""
        for number, name in enumerate(self.pictures):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if is_empty:
                path.touch()
            else:
                color = COLORS[number % len(COLORS)]
                Image.new("RGB", (8 + number, 8), color).save(path)
        for name, data in {self.file: self.table(), **self.others}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return f"{folder}{self.place}" if self.place.startswith("?") else str(folder / (self.place or self.file))

    def table(self) -> bytes:
        """The bytes of the table."""
        if self.content or not self.rows:
            return self.content
        if isinstance(self.rows[0], dict):
            return "".join(json.dumps(row) + "\n" for row in self.rows).encode()
        return text_table(self.rows, self.separator).encode()


def text_table(rows: Sequence[Sequence[str]], separator: str = ",", end: str = "\n") -> str:
    """CSV with quotes where they are needed."""
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator=end).writerows(rows)
    return text.getvalue()


def kaggle_fashion() -> Shape:
    """styles.csv of Fashion Product Images, with the commas that its last column holds without quotes."""
    head = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
    rows = [head.split(",")]
    ids = [str(1163 + n) for n in range(len(NAMES))]
    for n, (number, name) in enumerate(zip(ids, NAMES, strict=True)):
        rows.append([number, "Men", "Home", "Table", THINGS[n // 6], COLORS[n % 6], "Fall", "2011", "Casual", name])
    text = text_table(rows).replace(NAMES[5], f"{NAMES[5]}, large")
    return Shape(
        "styles.csv", [f"images/{i}.jpg" for i in ids], ids, (NAMES[0],), len(ids), rows, title=NAMES[0],
        category="mug", content=text.encode(),
    )  # fmt: skip


def hm() -> Shape:
    """articles.csv of H&M: the id filled up by zeros, in a folder of its first three digits."""
    rows = [["article_id", "product_code", "prod_name", "product_type_name", "colour_group_name", "detail_desc"]]
    ids = [str(108775015 + 50_000 * n) for n in range(len(NAMES))]
    for n, (number, name) in enumerate(zip(ids, NAMES, strict=True)):
        rows.append([number, number[:6], name.title(), THINGS[n // 6], COLORS[n % 6], f"A {name}, made by hand."])
    pictures = [f"images/{f'{i:0>10}'[:3]}/{i:0>10}.jpg" for i in ids]
    caption = f"A {NAMES[0]}, made by hand."
    return Shape(
        "articles.csv", pictures, ids, (caption,), len(ids), rows, title=NAMES[0].title(), category="mug"
    )  # fmt: skip


def shopify() -> Shape:
    """A product export: addresses, HTML over several lines, and rows of further pictures and variants."""
    rows = [["Handle", "Title", "Body (HTML)", "Vendor", "Type", "Option1 Value", "Image Src", "Image Position"]]
    for n, name in enumerate(NAMES):
        handle = name.replace(" ", "-")
        body = f"<p>A <strong>{name}</strong>,\n&quot;hand made&quot;.</p>\n<ul><li>1 kg</li></ul>"
        rows.append([handle, name.title(), body, "We", THINGS[n // 6], "small", f"{CDN}/{handle}.jpg?v=1571", "1"])
        rows.append([handle, "", "", "", "", "large", f"{CDN}/{handle}-back.jpg?v=1571" if n % 2 else "", ""])
    handles = [name.replace(" ", "-") for name in NAMES]
    ids = [f"pictures/{h}{end}.jpg" for n, h in enumerate(handles) for end in ("", *["-back"] * (n % 2))]
    caption = f'A {NAMES[0]}, "hand made". 1 kg'
    return Shape(
        "products_export.csv", ids, ids, (caption,), len(ids), rows, title=NAMES[0].title(), category="mug"
    )  # fmt: skip


def woocommerce() -> Shape:
    """A product export: a mark at the beginning, several addresses in a cell, literal line breaks in texts."""
    rows = [["ID", "Type", "SKU", "Name", "Short description", "Description", "Categories", "Images"]]
    for n, name in enumerate(NAMES):
        url = f"https://shop.example.com/wp-content/uploads/2024/05/{name.replace(' ', '-')}"
        text = f"<p>A {name} &amp; its box.</p>"
        rows.append([str(10 + n), "simple", f"S-{n}", name, "", text, "Home > Mugs", f"{url}.jpg, {url}-2.jpg"])
    pictures = [f"{name.replace(' ', '-')}.jpg" for name in NAMES]
    return Shape(
        "wc-products.csv", pictures, [str(10 + n) for n in range(len(NAMES))], (f"A {NAMES[0]} & its box.",),
        len(NAMES), rows, title=NAMES[0], category="Home > Mugs",
        content=b"\xef\xbb\xbf" + text_table(rows, end="\r\n").encode(),
    )  # fmt: skip


def amazon_berkeley() -> Shape:
    """Listings packed line by line, names in several languages, and a table that says where an image id lies."""
    rows, listed = list[dict[str, Any]](), [["image_id", "height", "width", "path"]]
    for n, name in enumerate(NAMES):
        names = [{"language_tag": "de_DE", "value": f"Tasse {n}"}, {"language_tag": "en_US", "value": name}]
        image = f"81iZlv{n:02}jL"
        rows.append({
            "item_id": f"B0{n:04}", "item_name": names, "main_image_id": image, "product_type": [{"value": "MUG"}]
        })  # fmt: skip
        listed.append([image, "8", "8", f"{n % 7:02x}/{n % 7:02x}{n:06x}.jpg"])
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)
    return Shape(
        "listings/metadata/listings_0.json.gz", [f"images/small/{row[3]}" for row in listed[1:]],
        [row["item_id"] for row in rows], (NAMES[0],), len(rows), rows, title=NAMES[0], category="MUG",
        place="?table=listings/metadata/*.json.gz", content=packed,
        others={"images/metadata/images.csv.gz": gzip.compress(text_table(listed).encode(), mtime=0)},
    )  # fmt: skip


def flickr30k() -> Shape:
    """results.csv: bars with spaces around, five captions an image, and one row without its last bar."""
    lines, names = ["image_name| comment_number| comment"], [f"{1000092795 + n}.jpg" for n in range(len(NAMES))]
    for n, name in enumerate(names):
        lines += [f"{name}| {k}|  {NAMES[n].capitalize()} number {k} ." for k in range(5)]
    lines[-1] = lines[-1].replace("|  ", "   ")
    return Shape(
        "results.csv", [f"flickr30k_images/{name}" for name in names], [f"flickr30k_images/{name}" for name in names],
        tuple(f"{NAMES[0].capitalize()} number {k} ." for k in range(5)), 5 * len(names), separator="|",
        content="\n".join([*lines, ""]).encode(),
    )  # fmt: skip


def coco() -> Shape:
    """captions_val2017.json: images, and five captions of each."""
    names = [f"{139 + n:012}.jpg" for n in range(len(NAMES))]
    images = [{"id": 139 + n, "file_name": name, "height": 8, "width": 8} for n, name in enumerate(names)]
    captions = [
        {"id": 5 * n + k, "image_id": 139 + n, "caption": f"{NAMES[n]} {k}"}
        for k in range(5)
        for n in range(len(names))
    ]
    content = json.dumps({"info": {}, "images": images, "annotations": captions}).encode()
    pictures = [f"val2017/{name}" for name in names]
    return Shape(
        "captions_val2017.json", pictures, pictures, tuple(f"{NAMES[0]} {k}" for k in range(5)), len(names),
        content=content,
    )  # fmt: skip


def imagefolder_jsonl() -> Shape:
    """metadata.jsonl of 🤗 Datasets beside the pictures."""
    names = [f"{n:04}.png" for n in range(len(NAMES))]
    rows = [{"file_name": name, "text": text} for name, text in zip(names, NAMES, strict=True)]
    return Shape("metadata.jsonl", names, names, (NAMES[0],), len(rows), rows, place=".")


def imagefolder_csv() -> Shape:
    """metadata.csv in the folder of a split."""
    names = [f"train/{n:04}.png" for n in range(len(NAMES))]
    rows = [["file_name", "text", "label"]]
    rows += [[name.partition("/")[2], text, "0"] for name, text in zip(names, NAMES, strict=True)]
    return Shape("train/metadata.csv", names, names, (NAMES[0],), len(names), rows, place=".")


def laion() -> Shape:
    """Parquet of addresses and texts, whose pictures were downloaded under their own names."""
    import pyarrow as pa
    from pyarrow import parquet

    urls = [f"https://example.org/{n % 5}/{text.replace(' ', '%20')}.jpg" for n, text in enumerate(NAMES)]
    table = pa.table({"URL": urls, "TEXT": NAMES, "WIDTH": [8] * len(urls), "similarity": [0.3] * len(urls)})
    file = io.BytesIO()
    parquet.write_table(table, file)
    pictures = [f"{text}.jpg" for text in NAMES]
    return Shape("part-00000.parquet", pictures, pictures, (NAMES[0],), len(urls), content=file.getvalue())


def webdataset() -> Shape:
    """A shard of img2dataset: the caption in .txt and in .json beside the picture."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for n, name in enumerate(NAMES):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (n % 256, 99, 0)).save(picture, "JPEG")
            about = json.dumps({"caption": name, "url": f"https://example.org/{n}.jpg", "key": f"{n:09}"})
            for suffix, data in (("jpg", picture.getvalue()), ("txt", name.encode()), ("json", about.encode())):
                member = tarfile.TarInfo(f"{n:09}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    ids = [f"{n:09}.jpg" for n in range(len(NAMES))]
    return Shape("00000.tar", [], ids, (NAMES[0],), len(NAMES), content=file.getvalue())


SHAPES: dict[str, Callable[[], Shape]] = {
    made.__name__: made
    for made in (
        kaggle_fashion, hm, shopify, woocommerce, amazon_berkeley, flickr30k, coco, imagefolder_jsonl, imagefolder_csv,
        laion, webdataset,
    )
}  # fmt: skip
