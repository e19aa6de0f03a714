"""Who asks: bearer tokens from a file, each with contexts of its own."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from nemo_star.runtime.launch import warn
from nemo_star.server.errors import ApiError

NOBODY = ""
"""The owner of everything where no keys are asked for."""
SHORT = 16
"""Characters; a key of fewer can be guessed."""


class Keys:
    """The keys of a file, one a line; lines that are empty or begin with # are none.

    Raises:
        ValueError: a file that cannot be read, without keys, or with one that holds what no header can.
    """

    def __init__(self, file: str | None) -> None:
        self._digests: list[bytes] | None = None
        if file is None:
            return
        try:
            lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise ValueError(f"server.api_keys_file={file}: {error.strerror}") from error
        except UnicodeDecodeError:
            raise ValueError(f"server.api_keys_file={file} is no UTF-8 text") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"server.api_keys_file={file} holds no key: write one a line")
        for number, key in enumerate(keys, start=1):
            if not all("!" <= character <= "~" for character in key):
                raise ValueError(
                    f"server.api_keys_file={file}: key {number} must be visible ASCII characters without blanks"
                )
        if (short := min(map(len, keys))) < SHORT:
            warn(f"server.api_keys_file={file} holds a key of {short} characters: it can be guessed")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def are_asked_for(self) -> bool:
        return self._digests is not None

    def owner(self, authorization: str | None) -> str:
        """Whose request this is, from its Authorization header.

        Raises:
            ApiError: 401.
        """
        if self._digests is None:
            return NOBODY
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All are compared, so that the time tells nothing of which one was near.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(401, "give a valid key: Authorization: Bearer KEY", code="invalid_api_key", retry=False)
        return digest.hex()[:32]
