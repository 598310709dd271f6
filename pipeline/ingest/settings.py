"""What an ingest can be told: which pictures become samples, in what form, in files of what size."""

from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.data.picture import Crop, Filter, Format
from pipeline.schema import Section

STORED_AS = ("size", "format", "quality", "filter", "crop", "tile", "upscale", "limit")
LAID_OUT_AS = ("part_pictures", "row_group_bytes", "row_group_rows", "shard_bytes")


class TileConfig(Section):
    """Cuts each source picture into squares, each a sample of its own."""

    size: int = Field(64, ge=8)
    """Side of a tile in pixels of the source; tiles are resized to ingest.size where that is smaller."""
    stride: int = Field(32, ge=1)
    """Step from tile to tile; below `size`, tiles overlap."""
    minimum_deviation: float = Field(12.0, ge=0)
    """Tiles with less standard deviation (grey levels, averaged over channels) are left out: ocean, sky."""
    latitude: float = Field(65.0, gt=0, le=90)
    """Takes what lies between these degrees north and south of an equirectangular picture; 90 takes all."""


class IngestConfig(Section):
    """Which pictures become samples, and in what form."""

    source: str | None = None
    """JPEG, PNG or WebP, local or s3://: a nested folder, a zip, a tar or a folder of tars (WebDataset), LSUN's LMDB,
    Parquet with a column `image`, or (with `tile`) one large picture."""
    size: int = Field(256, ge=8)
    """Side of the stored pictures in pixels. Larger than `model.size` where `data.crop` cuts while training."""
    format: Format = "keep"
    """"keep" stores the source's own bytes where nothing has to change, and PNG otherwise."""
    quality: int = Field(95, ge=1, le=100)
    """Of JPEG; chroma is never subsampled."""
    filter: Filter = "lanczos"
    """For resizing. Published FFHQ 256 numbers need "box"."""
    crop: Crop = "center"
    """Pictures that are not square lose their margins."""
    tile: TileConfig | None = None
    """Cut large pictures into tiles instead of shrinking them."""
    upscale: bool = False
    """Enlarge pictures smaller than `size`; otherwise they are skipped and reported."""
    workers: int = Field(0, ge=0)
    """Processes on this machine; 0 is one for each core. The result does not depend on it."""
    strict: bool = False
    """Fail at the first picture that cannot be used, instead of skipping and reporting it."""
    part_pictures: int = Field(4096, gt=0)
    """Pictures (or places of tiles) in a part: what one process makes at a time and a restart does not repeat."""
    row_group_bytes: int = Field(8 << 20, gt=0)
    """Most picture bytes in a row group, the unit of one read; a single larger picture gets its own."""
    row_group_rows: int = Field(256, gt=0)
    """Most pictures in a row group."""
    shard_bytes: int = Field(256 << 20, gt=0)
    """Most picture bytes in one file; 64 to 512 MB read well from S3."""
    limit: int | None = Field(None, ge=1)
    """Look at only the first so many pictures of the source, or with `tile` at the first so many places."""
    overwrite: bool = False
    """Replace a finished data set that was made from something else or with other settings."""

    @model_validator(mode="after")
    def _tiles_fill_samples(self) -> Self:
        if self.tile and self.tile.size < self.size and not self.upscale:
            raise ValueError(
                f"ingest.tile.size {self.tile.size} is smaller than ingest.size {self.size}; make the tiles "
                f"larger, ingest.size smaller, or set ingest.upscale=true"
            )
        return self


def stored_parameters(config: IngestConfig) -> dict[str, Any]:
    """The settings that decide which bytes are stored, for JSON; the others change only how long it takes."""
    keys = {*STORED_AS, *LAID_OUT_AS} - (set() if config.format == "jpeg" else {"quality"})
    return config.model_dump(mode="json", include=keys)
