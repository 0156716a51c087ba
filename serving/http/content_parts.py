"""The content parts of a message in OpenAI's chat request: text, pictures and clips, as sent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, model_validator
from pydantic_core import PydanticCustomError


class Wire(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", use_attribute_docstrings=True)


class TextPart(Wire):
    type: Literal["text"]
    text: str


class RefusalPart(Wire):
    """The refusal of an earlier answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ImageUrl(Wire):
    url: str
    """A data URL in base64 (PNG, JPEG, WebP, GIF), or an address on a host of `serve.allowed_image_hosts`."""


class ImagePart(Wire):
    """A picture, for models that see; OpenAI's `detail` has no effect."""

    type: Literal["image_url"]
    image_url: ImageUrl

    @property
    def url(self) -> str:
        return self.image_url.url


class VideoUrl(Wire):
    url: str
    """A data URL in base64 (MP4, animated GIF or WebP), or an address on a host of `serve.allowed_image_hosts`."""


class VideoPart(Wire):
    """A clip, for models that see: frames of it, each with its time."""

    type: Literal["video_url"]
    video_url: VideoUrl

    @property
    def url(self) -> str:
        return self.video_url.url


class OtherPart(Wire):
    """Audio and files, which are not supported."""

    type: str

    @model_validator(mode="after")
    def _refuse(self) -> OtherPart:
        if self.type in ("input_audio", "file"):
            raise PydanticCustomError("unsupported_parameter", "not supported by this endpoint; send its text")
        raise PydanticCustomError("unknown_part", "unknown part; send parts of type 'text'")


def type_of(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _part_tag(value: Any) -> str:
    kind = type_of(value)
    return f"~{kind}" if kind in ("text", "refusal", "image_url", "video_url") else "~other"


def _text_or_list(value: Any) -> str | None:
    return "~string" if isinstance(value, str) else "~list" if isinstance(value, list) else None


def text_or_list(message: str) -> Discriminator:
    """Of the branches `~string` and `~list`; any other value is refused with this message."""
    return Discriminator(_text_or_list, "wrong_type", message)


MediaPart = ImagePart | VideoPart
Part = Annotated[
    Annotated[TextPart, Tag("~text")]
    | Annotated[RefusalPart, Tag("~refusal")]
    | Annotated[ImagePart, Tag("~image_url")]
    | Annotated[VideoPart, Tag("~video_url")]
    | Annotated[OtherPart, Tag("~other")],
    Discriminator(_part_tag),
]
Content = Annotated[
    Annotated[str, Tag("~string")] | Annotated[list[Part], Tag("~list")],
    text_or_list("expected a string or a list of content parts"),
]
