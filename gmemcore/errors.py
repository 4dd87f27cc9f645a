"""Every way in which gmemcore refuses.

::

    GmemError (OSError)            errno, error_offset, outcome
    +-- InvalidArgumentError       EINVAL      a value that no state could make acceptable
    +-- UnsupportedContentModeError EOPNOTSUPP a content mode this VM, direction and phase can't honour
    +-- UnsupportedOperationError  EOPNOTSUPP  an operation the file or the backing doesn't have
    +-- PagePinnedError            EAGAIN      a page with an unexpected reference
    +-- OutOfMemoryError           ENOMEM
    +-- AlreadyExistsError         EEXIST      a memslot that overlaps another
    +-- FileTooLargeError          EFBIG       a file range that ends beyond 2^63 - 1
    +-- BadFileError               EBADF       not an open guest_memfd
    +-- BadAddressError            EFAULT      memory that can't be reached
    +-- UnknownIoctlError          ENOTTY      a request this fd doesn't have
    +-- NotMappableError           ENODEV      a file created without MMAP
    +-- NotPermittedError          EPERM       an executable mapping
    +-- NotSeekableError           ESPIPE      a positioned read or write of a guest_memfd
    +-- InterruptedCallError       EINTR       a signal came
    +-- LaunchUpdateError          as KVM's    pages_done says how far it came
    +-- LaunchFinishError          as KVM's    the launch is finished already
    +-- HostAccessError            SIGBUS      the host touched what it may not
    +-- GuestExit                  KVM_RUN's exits
        +-- MemoryFaultExit        MEMORY_FAULT (gpa, size, flags)
        +-- MmioExit               MMIO         no memslot there
        +-- NotValidatedExit       NOT_VALIDATED: private memory the guest hasn't accepted
        +-- HwPoisonExit           EHWPOISON

Values of a wrong Python type are ``TypeError``, as everywhere in Python.
"""

import errno
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

ERRNO_NAMES = {
    getattr(errno, name): name
    for name in (
        *("EINVAL", "EOPNOTSUPP", "EAGAIN", "ENOMEM", "EEXIST", "EBADF", "EFAULT", "ENOTTY"),
        *("ENODEV", "EIO", "EACCES", "EPERM", "ENOSPC", "EFBIG", "ESPIPE", "EOVERFLOW", "EINTR"),
    )
} | {133: "EHWPOISON"}
"""errno number -> the one name this project uses for it."""

ERRNO_NUMBERS = {name: number for number, name in ERRNO_NAMES.items()} | {"ENOTSUP": errno.ENOTSUP}
"""errno name -> number."""


class GmemError(OSError):
    """A refusal, as the kernel would give it.

    Parameters
    ----------
    message : str
        What is wrong, where (bytes in hex), and what is accepted.
    error_offset : int or None
        Byte offset in the file of the first page that stopped the call, where the interface reports one.

    Attributes
    ----------
    errno : int
        The errno number.
    error_offset : int or None
        As the parameter.
    outcome : str
        The errno's name; for accesses ``SIGBUS``, ``MEMORY_FAULT``, ``MMIO`` or ``NOT_VALIDATED``.
    """

    number: ClassVar[int] = errno.EINVAL
    outcome: str

    def __init__(self, message: str, *, error_offset: int | None = None) -> None:
        super().__init__(self.number, message)
        self.error_offset = error_offset
        if not hasattr(self, "outcome"):
            self.outcome = ERRNO_NAMES[self.number]

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild without calling ``__init__``, whose arguments differ from class to class."""
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(kind: type[GmemError], args: tuple[Any, ...], attributes: dict[str, Any]) -> GmemError:
    error = kind.__new__(kind, *args)
    OSError.__init__(error, *args)
    error.__dict__.update(attributes)
    return error


class InvalidArgumentError(GmemError):
    """EINVAL: a value that no state of the machine could make acceptable."""

    number = errno.EINVAL


class UnsupportedContentModeError(GmemError):
    """EOPNOTSUPP: a known content mode that this VM can't honour for this direction and phase."""

    number = errno.EOPNOTSUPP


class UnsupportedOperationError(GmemError):
    """EOPNOTSUPP: an operation that the file doesn't have."""

    number = errno.EOPNOTSUPP


class NoBytesError(UnsupportedOperationError):
    """ENOTSUP: bytes were asked of an attributes-only file."""

    outcome = "ENOTSUP"


class PagePinnedError(GmemError):
    """EAGAIN: a page of the range has an unexpected reference; ``error_offset`` is the first one's."""

    number = errno.EAGAIN


class OutOfMemoryError(GmemError):
    """ENOMEM: the host can't hold what was asked for."""

    number = errno.ENOMEM


class AlreadyExistsError(GmemError):
    """EEXIST: a memslot overlaps another one in gpa, or in the same file."""

    number = errno.EEXIST


class FileTooLargeError(GmemError):
    """EFBIG: a range of a file ends beyond 2^63 - 1, the largest offset there is."""

    number = errno.EFBIG


class BadFileError(GmemError):
    """EBADF: not an open guest_memfd."""

    number = errno.EBADF


class BadAddressError(GmemError):
    """EFAULT: memory that can't be read, written or pinned."""

    number = errno.EFAULT


class UnknownIoctlError(GmemError):
    """ENOTTY: a request that this fd doesn't have."""

    number = errno.ENOTTY


class NotMappableError(GmemError):
    """ENODEV: the file was created without MMAP."""

    number = errno.ENODEV


class NotPermittedError(GmemError):
    """EPERM: an executable mapping of a guest_memfd."""

    number = errno.EPERM


class NotSeekableError(GmemError):
    """ESPIPE: a guest_memfd has no position, and no positioned reads and writes."""

    number = errno.ESPIPE


class InterruptedCallError(GmemError):
    """EINTR: a signal came; what was done stays done."""

    number = errno.EINTR


class LaunchUpdateError(GmemError):
    """A launch update stopped.

    Attributes
    ----------
    pages_done : int
        Pages that were populated before; they stay.
    """

    def __init__(self, message: str, outcome: str, pages_done: int) -> None:
        self.outcome = outcome
        self.number = ERRNO_NUMBERS[outcome]  # type: ignore[misc]  # the one class with KVM's choice of errno
        self.pages_done = pages_done
        super().__init__(message)


class LaunchFinishError(GmemError):
    """A launch was finished twice: EINVAL, or EIO where it is the firmware that refuses."""

    def __init__(self, message: str, outcome: str) -> None:
        self.outcome = outcome
        self.number = ERRNO_NUMBERS[outcome]  # type: ignore[misc]  # KVM's choice of errno
        super().__init__(message)


class HostAccessError(GmemError):
    """SIGBUS: the host touched a private page, a poisoned one, or beyond the end of the file."""

    number = errno.EFAULT
    outcome = "SIGBUS"


class GuestExit(GmemError):
    """The guest could not go on: what KVM_RUN reports to the VMM.

    Attributes
    ----------
    gpa : int
        Guest physical address of the page.
    size : int
        Bytes of that page.
    flags : int
        For MEMORY_FAULT, 8 (PRIVATE) if the access was private; else 0.
    """

    number = errno.EFAULT

    def __init__(self, message: str, gpa: int, size: int, flags: int = 0) -> None:
        super().__init__(message)
        self.gpa, self.size, self.flags = gpa, size, flags


class MemoryFaultExit(GuestExit):
    """KVM_EXIT_MEMORY_FAULT: the kind of the access doesn't fit the page's attribute."""

    outcome = "MEMORY_FAULT"


class MmioExit(GuestExit):
    """KVM_EXIT_MMIO: no memslot holds this address."""

    outcome = "MMIO"


class NotValidatedExit(GuestExit):
    """The guest touched private memory that it hasn't accepted (#VC on SNP, #VE on TDX)."""

    outcome = "NOT_VALIDATED"


class HwPoisonExit(GuestExit):
    """EHWPOISON: the page's memory has failed."""

    number = 133
    outcome = "EHWPOISON"


class InputError(ValueError):
    """A file or an option that can't be used; the message is one line that says which and why."""


class MissingExtraError(ImportError):
    """A library that isn't installed; the message says how to install it."""


def with_known(error: Exception, kind: type) -> str:
    """Return what is wrong with a file that is read strictly, with the names that are accepted.

    Parameters
    ----------
    error : Exception
        As msgspec has it, its place at the end in single back quotes, as in ``$.guest.vm_types[0]``.
    kind : type
        The struct that was to be read.
    """
    text = str(error)
    found = re.search(r"Invalid enum value .* - at `\$(.*)`", text)
    if found is None:
        return text
    leaves: list[Any] = [kind]
    for name in re.findall(r"\.(\w+)", found[1]):
        hints = (get_type_hints(leaf) for leaf in leaves if hasattr(leaf, "__struct_fields__"))
        leaves = [leaf for hint in hints if name in hint for leaf in _leaves(hint[name])]
    known = [name for leaf in leaves for name in _names(leaf)]
    return f"{text}; known: {', '.join(map(str, known))}" if known else text


def _leaves(hint: Any) -> Iterator[Any]:
    """Yield the types that containers and unions are of."""
    if get_origin(hint) is Literal or not get_args(hint):
        yield hint
    else:
        for each in get_args(hint):
            yield from _leaves(each)


def _names(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, type) and issubclass(leaf, Enum):
        return tuple(member.value for member in leaf)
    return get_args(leaf)
