"""The connection to an S3-compatible store: retries, ranged reads, and faults in one line.

Endpoint, region, credentials and certificates come from where every AWS client looks for them:
`AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_PROFILE`, `AWS_CA_BUNDLE` and the files and roles behind them.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import boto3  # type: ignore[import-untyped]
import botocore.loaders  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
from botocore import exceptions as faults
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from spectraqlora.errors import InputError, NoAnswer
from spectraqlora.storage.address import Address

MIB = 1 << 20
PART_BYTES = 16 * MIB
WORKERS = 8
CHUNK_BYTES = MIB
_FIELD = "s3 address"
_STEADY = "an object that does not change while it is read"
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile's"
_NEEDED = {
    "get_object": "s3:GetObject, and s3:ListBucket to learn what is missing",
    "head_object": "s3:GetObject",
    "list_objects_v2": "s3:ListBucket",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_parts": "s3:ListMultipartUploadParts",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "delete_object": "s3:DeleteObject",
}
_EXPECTED = {
    "NoSuchBucket": "a bucket that exists; the store has none of this name (404)",
    "InvalidBucketName": "a bucket name that the store accepts",
    "SignatureDoesNotMatch": "the secret that belongs to the access key; the store refused the signature "
    f"(403). Check {_CREDENTIALS}",
    "InvalidAccessKeyId": f"an access key that the store knows (403). Check {_CREDENTIALS}",
    "ExpiredToken": "credentials that have not expired; log in again",
    "InvalidToken": "a session token that the store accepts (AWS_SESSION_TOKEN)",
    "RequestTimeTooSkewed": "a clock within 15 minutes of the store's (403); set this machine's clock",
    "InvalidObjectState": "an object that can be read at once; this one is archived",
}
_WRONG_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
}
_ALWAYS_SAID = {
    "list_objects_v2": "Name",
    "list_multipart_uploads": "Bucket",
    "list_parts": "Bucket",
    "create_multipart_upload": "UploadId",
    "complete_multipart_upload": "ETag",
    "upload_part": "ETag",
    "get_object": "ContentLength",
    "head_object": "ContentLength",
}
"""What every store answers. An answer that a broken connection cut within its head, or that lost its body, says nothing:
botocore takes it for an empty list."""
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestLimitExceeded"}


class ObjectMissing(InputError):
    """There is no object of this key."""


class ObjectChanged(InputError):
    """The object is no longer the one that was listed or opened."""


class ObjectDamaged(InputError):
    """An object is not what was published: another SHA-256, or a manifest that was cut or changed."""


def _code(error: faults.ClientError) -> tuple[str, int]:
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code, int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _passing(error: Exception) -> bool:
    """True for faults that a later try may not meet: overload, timeouts, broken connections."""
    if isinstance(error, faults.ClientError):
        code, status = _code(error)
        return (status >= 500 and status != 501) or status == 429 or code in _THROTTLED
    if isinstance(error, faults.SSLError):
        return "CERTIFICATE" not in str(error).upper()
    return isinstance(
        error,
        (
            faults.ConnectionError,
            faults.HTTPClientError,
            faults.IncompleteReadError,
            faults.ResponseStreamingError,
            faults.MetadataRetrievalError,
        ),
    )


def _redirected_for_ever(error: BaseException | None) -> bool:
    """True where botocore asks where it is sent to, and is sent on again; where that ends its client may wrap it."""
    while error is not None and not isinstance(error, RecursionError):
        error = error.__cause__ or error.__context__
    return error is not None


def _explained(error: Exception, operation: str, address: Address, endpoint: str) -> InputError:
    """The fault as one line. Never the text of the error itself: it may quote proxies or keys."""
    where = f"the store at {endpoint}"
    if isinstance(error, faults.ClientError):
        code, status = _code(error)
        if code in ("NoSuchKey", "404", "NoSuchVersion"):
            return ObjectMissing(_FIELD, address, f"an object that exists; {where} has none (404)")
        if code == "NoSuchUpload":
            return ObjectMissing(
                _FIELD, address, f"an upload that is still open; {where} has dropped it. Repeat it"
            )
        if status in (412, 416):  # Another ETag than the expected one; shorter than what was asked for.
            return ObjectChanged(_FIELD, address, _STEADY)
        if code in _EXPECTED:
            return InputError(_FIELD, address, _EXPECTED[code])
        if code in _WRONG_REGION:
            expected = "the bucket's own region and endpoint (AWS_REGION, AWS_ENDPOINT_URL)"
            return InputError(_FIELD, address, f"{expected}; {where} says {code}")
        if status in (401, 403):
            needed = _NEEDED.get(operation, "s3:PutObject")
            return InputError(
                _FIELD, address, f"credentials with permission ({needed}); {where} refused them ({status})"
            )
        refusal = NoAnswer if _passing(error) else InputError
        return refusal(_FIELD, address, f"a store that answers {operation}; {where} says {code} ({status})")
    if isinstance(error, (faults.NoCredentialsError, faults.PartialCredentialsError)):
        return InputError(_FIELD, address, f"credentials: {_CREDENTIALS}")
    if isinstance(error, faults.SSLError):
        return InputError(
            _FIELD, address, f"a certificate that this machine trusts (AWS_CA_BUNDLE); {where} shows another"
        )
    if _passing(error):
        return NoAnswer(
            _FIELD,
            address,
            f"a store that can be reached (AWS_ENDPOINT_URL); {endpoint}: {type(error).__name__}",
        )
    if isinstance(error, ResponseParserError):
        return InputError(
            _FIELD, address, f"an endpoint that speaks S3 (AWS_ENDPOINT_URL); {endpoint} does not"
        )
    return InputError(_FIELD, address, f"working AWS settings; {where}: {type(error).__name__}")


class _Patience:
    """Waits between tries that fail; raises once a fault is final or has lasted too long."""

    def __init__(self, connection: Connection, operation: str, address: Address) -> None:
        self._connection, self._operation, self._address = connection, operation, address
        self.renew()

    def renew(self) -> None:
        """Something arrived: the clock starts anew."""
        self._began, self._tries = time.monotonic(), 0

    def failed(self, error: Exception) -> None:
        lasted = time.monotonic() - self._began
        if not _passing(error) or lasted > self._connection.patience_s:
            raise _explained(error, self._operation, self._address, self._connection.endpoint) from None
        self._tries += 1
        # Jitter keeps the workers from coming back all at once.
        time.sleep(min(4.0, 0.25 * 2**self._tries) * random.uniform(0.5, 1.0))


@functools.cache
def _definitions() -> Any:
    """What botocore knows of AWS, parsed once: doing so takes a third of a second."""
    return botocore.loaders.create_loader()


class Connection:
    """A client of one store; safe to share between threads.

    Args:
        workers: requests in flight at once.
        part_bytes: bytes of one part of a transfer, at least 5 MiB where the store is Amazon's.
        patience_s: seconds for which a store may be overloaded or away, without a byte of progress,
            before a request that has worked before is given up. One that never answered gets a tenth.

    Uploads hold at most workers x part_bytes in memory (128 MiB by default); downloads to disk
    at most workers x 1 MiB.
    """

    def __init__(
        self, workers: int = WORKERS, part_bytes: int = PART_BYTES, patience_s: float = 60.0
    ) -> None:
        self.workers, self.part_bytes = workers, part_bytes
        self._patience_s, self._answered = patience_s, threading.Event()
        config = Config(
            connect_timeout=5,
            read_timeout=60,
            retries={"mode": "standard", "total_max_attempts": 3},
            # Stores other than Amazon's refuse, or answer ranged reads with, checksums of newer protocols.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=workers + 2,
            tcp_keepalive=True,
        )
        try:
            session = botocore.session.get_session()
            session.register_component("data_loader", _definitions())
            self._client = boto3.session.Session(botocore_session=session).client("s3", config=config)
        except (faults.BotoCoreError, ValueError) as error:
            raise InputError(
                "AWS settings",
                "environment and profile",
                f"a valid profile, region and AWS_ENDPOINT_URL ({type(error).__name__})",
            ) from None
        # An endpoint may carry a user and a password; only the host is ever shown.
        self.endpoint = str(self._client.meta.endpoint_url).split("://")[-1].split("@")[-1].rstrip("/")

    @property
    def patience_s(self) -> float:
        """Seconds that faults may last now: an endpoint that never answered is likely a wrong one."""
        return self._patience_s if self._answered.is_set() else self._patience_s / 10

    def _request(self, operation: str, address: Address, **arguments: Any) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = getattr(self._client, operation)(Bucket=address.bucket, **arguments)
        except (RecursionError, faults.HTTPClientError) as error:
            if not _redirected_for_ever(error):
                raise
            raise InputError(
                _FIELD,
                address,
                f"an endpoint that answers itself (AWS_ENDPOINT_URL, http or https, AWS_REGION); "
                f"{self.endpoint} redirects every request (301)",
            ) from None
        except ValueError:  # Of a number that was cut.
            reply = {}
        if _ALWAYS_SAID.get(operation, "ResponseMetadata") not in reply:
            raise faults.ConnectionClosedError(endpoint_url=self.endpoint)
        self._answered.set()
        return reply

    def call(self, operation: str, address: Address, **arguments: Any) -> dict[str, Any]:
        """One request on the address's bucket; passing faults are waited out.

        Raises:
            InputError: what is wrong, in one line; `ObjectMissing` where the key does not exist.
        """
        patience = _Patience(self, operation, address)
        while True:
            try:
                return self._request(operation, address, **arguments)
            except (faults.ClientError, faults.BotoCoreError, ResponseParserError) as error:
                patience.failed(error)

    def read_range(
        self,
        address: Address,
        offset: int,
        length: int,
        sink: Callable[[int, bytes], None],
        etag: str | None = None,
    ) -> None:
        """Stream bytes of an object to `sink(offset, chunk)` in chunks of at most 1 MiB.

        A connection that breaks is taken up again at the byte it broke at.

        Raises:
            ObjectChanged: the object's ETag is not the expected one.
            InputError: what else is wrong, in one line.
        """
        end = offset + length
        patience = _Patience(self, "get_object", address)
        while offset < end:
            # If-Match is refused by stores that know it; the reply's ETag is checked for those that do not.
            condition = {"IfMatch": f'"{etag}"'} if etag else {}
            try:
                reply = self._request(
                    "get_object", address, Key=address.key, Range=f"bytes={offset}-{end - 1}", **condition
                )
                if etag and reply["ETag"].strip('"') != etag:
                    raise ObjectChanged(_FIELD, address, _STEADY)
                if reply["ContentLength"] != end - offset:
                    raise ObjectChanged(
                        _FIELD,
                        address,
                        f"{end - offset} bytes from byte {offset}; the store offers {reply['ContentLength']}",
                    )
                with contextlib.closing(reply["Body"]) as body:
                    for chunk in body.iter_chunks(CHUNK_BYTES):
                        sink(offset, chunk)
                        offset += len(chunk)
                        patience.renew()
            except (faults.ClientError, faults.BotoCoreError, ResponseParserError) as error:
                patience.failed(error)
