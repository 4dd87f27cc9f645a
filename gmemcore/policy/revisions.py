"""The posted revisions of the interface and the proposals for it, one block of rows each.

To add a revision or a proposal, add an `Abi` at the end of this file with the rows that it doesn't share;
nothing else changes. Rows say where a flag is allowed. What no row allows is refused; a row with effect
REFUSED only gives the reason.

The series is "guest_memfd: in-place conversion" by Ackerley Tng and others, 2025-2026. PKVM's rows are a
hypothesis: no posted revision had an arm64 hook, but the thread says how it should behave.
"""

from typing import Final

from gmemcore.policy.abi import ASSIGNED, Abi, Flag, FlagsCapability, Rule
from gmemcore.policy.platforms import PLATFORMS
from gmemcore.uapi import Capability, ContentMode, Direction, Firmware, Phase, VmType

# --- sources ------------------------------------------------------------------------------------------------
API_4_141 = "KVM API documentation, 4.141 KVM_SET_MEMORY_ATTRIBUTES, upstream since 6.8"
RFC_V4 = "RFC v4, 26 Mar 2026 <20260326-gmem-inplace-conversion-v4-0-e202fe950ffd@google.com>"
RFC_V5 = "RFC v5, 28 Apr 2026 <20260428-gmem-inplace-conversion-v5-0-d8608ccfca22@google.com>"
PATCH_V6 = "PATCH v6, 7 May 2026 <20260507-gmem-inplace-conversion-v6-0-91ab5a8b19a4@google.com>"
PATCH_V13 = "PATCH v13, 10 Sep 2026 <20260910-gmem-inplace-conversion-v13-0-dd6fbf94f4e1@google.com>"
ACKERLEY_24_APR = "Ackerley Tng, 24 Apr 2026, Re: [RFC v4 10/44], quoted in the answer of 29 Apr 2026"
ACKERLEY_30_APR = "Ackerley Tng, 30 Apr 2026, Re: [RFC v4 10/44]"
MICHAEL_29_APR = (
    "Michael Roth, 29 Apr 2026, Re: [RFC v4 10/44] "
    "<foi2zvv5qrfdcspnx4fstrvzl74m6xp6zrsw5omlbprxh4jrhx@vxnwk7fr46gu>"
)
MICHAEL_29_APR_SECOND = (
    "Michael Roth, 29 Apr 2026, Re: [RFC v4 10/44] "
    "<x7n77snnvvukofo3slopl74c5tmlb2t2un5qy5fq6eb3d2xt7e@6a6tixg5mdfc>"
)

# --- who, when, which way -----------------------------------------------------------------------------------
PRIVATE_MEMORY = frozenset(row.vm_type for row in PLATFORMS.values() if row.private_memory)
NO_PRIVATE_MEMORY = frozenset(PLATFORMS) - PRIVATE_MEMORY
COCO = frozenset(row.vm_type for row in PLATFORMS.values() if row.coco)
IN_CLEAR = PRIVATE_MEMORY - COCO
SW_PROTECTED = frozenset({VmType.SW_PROTECTED})
SNP = frozenset({VmType.SNP})
TDX = frozenset({VmType.TDX})

BEFORE_LAUNCH = frozenset({Phase.LAUNCHING})
AFTER_LAUNCH = frozenset({Phase.RUNNING})
TO_PRIVATE = frozenset({Direction.TO_PRIVATE})
TO_SHARED = frozenset({Direction.TO_SHARED})
CIPHER_FIRMWARE = frozenset({Firmware.CIPHER})
TODAYS_FIRMWARE = frozenset({Firmware.TODAY})

NO_FLAG = ContentMode.NONE
KEEP, ZEROES, SCRAMBLE, ENCRYPT, DECRYPT, REFUSED = "KEEP", "ZERO", "SCRAMBLE", "ENCRYPT", "DECRYPT", None

# --- flags --------------------------------------------------------------------------------------------------
ZERO = Flag(
    "ZERO",
    ContentMode.ZERO,
    "after the conversion, everyone with access reads zeros",
    directions=TO_SHARED,
)
PRESERVE = Flag(
    "PRESERVE",
    ContentMode.PRESERVE,
    "the new side reads the last value that the old side wrote in clear",
    preserves=True,
)
PRESERVE_BEFORE_LAUNCH = Flag(
    "PRESERVE_BEFORE_LAUNCH",
    ContentMode.PRESERVE_BEFORE_LAUNCH,
    "PRESERVE, for use before launch only",
    phases=BEFORE_LAUNCH,
    preserves=True,
)
PRESERVE_AFTER_LAUNCH = Flag(
    "PRESERVE_AFTER_LAUNCH",
    ContentMode.PRESERVE_AFTER_LAUNCH,
    "PRESERVE, for use after launch",
    phases=AFTER_LAUNCH,
    preserves=True,
)
CIPHER = Flag(
    "CIPHER",
    ContentMode.CIPHER,
    "encrypt or decrypt the contents while converting",
    preserves=True,
)

# --- requests without flags ---------------------------------------------------------------------------------
PLAIN_KEEPS = Rule(
    PRIVATE_MEMORY,
    NO_FLAG,
    KEEP,
    "KVM itself does not touch contents; whatever the trusted firmware does to them stands.",
    PATCH_V6,
)
UNSPECIFIED_KEEPS = Rule(
    PRIVATE_MEMORY - SW_PROTECTED,
    NO_FLAG,
    KEEP,
    "Without a content flag nothing is promised about contents; only the platform's own step happens.",
    RFC_V4,
)
UNSPECIFIED_SCRAMBLES = Rule(
    SW_PROTECTED,
    NO_FLAG,
    SCRAMBLE,
    "Without a content flag nothing is promised; random bytes let tests catch code that relies on contents.",
    RFC_V4,
)
DEFAULT_IS_SHARED = Rule(
    NO_PRIVATE_MEMORY,
    NO_FLAG,
    KEEP,
    "Attribute 0 asks a VM without private memory for what it already has.",
    RFC_V5,
    directions=TO_SHARED,
)
LEGACY_FLIPS = Rule(
    PRIVATE_MEMORY,
    NO_FLAG,
    KEEP,
    "The VM-fd ioctl flips the attribute and nothing else; each of the two backings keeps its bytes.",
    API_4_141,
)
LEGACY_DEFAULT_IS_SHARED = Rule(
    NO_PRIVATE_MEMORY,
    NO_FLAG,
    KEEP,
    "A VM without private memory supports no attribute, so 0 is the only value it accepts.",
    API_4_141,
    directions=TO_SHARED,
)

# --- ZERO ---------------------------------------------------------------------------------------------------
ZERO_TO_SHARED = Rule(
    PRIVATE_MEMORY,
    ZERO.bit,
    ZEROES,
    "Zeroing what becomes shared is a contract between KVM and the host, which every VM type can keep.",
    RFC_V4,
    directions=TO_SHARED,
)
ZERO_NOT_TO_PRIVATE = Rule(
    PRIVATE_MEMORY,
    ZERO.bit,
    REFUSED,
    "What a guest reads in new private memory is between it and the firmware; KVM cannot promise zeros.",
    RFC_V4,
    directions=TO_PRIVATE,
)

# --- PRESERVE where private memory lies in clear ------------------------------------------------------------
PRESERVE_IN_CLEAR = Rule(
    IN_CLEAR,
    PRESERVE.bit,
    KEEP,
    "Private memory is in clear there, so leaving the bytes alone preserves them, at any time and both ways.",
    MICHAEL_29_APR,
)

# --- PRESERVE on CoCo: before launch ------------------------------------------------------------------------
PRESERVE_UNTIL_POPULATE = Rule(
    COCO,
    PRESERVE.bit,
    KEEP,
    "Before launch the bytes stay in place until populate encrypts and measures them for the guest.",
    f"{RFC_V5}; agreed on before, {MICHAEL_29_APR}",
    phases=BEFORE_LAUNCH,
    directions=TO_PRIVATE,
)
PRESERVE_BACK_BEFORE_LAUNCH = Rule(
    COCO,
    PRESERVE.bit,
    KEEP,
    "The assert proposed for userspace looks at the launch phase alone: before launch, both directions pass.",
    MICHAEL_29_APR,
    phases=BEFORE_LAUNCH,
    directions=TO_SHARED,
)
PRESERVE_NOT_BACK_BEFORE_LAUNCH = Rule(
    COCO,
    PRESERVE.bit,
    REFUSED,
    "A populated page reads as ciphertext or zeros once it is shared, so nothing can be promised to shared.",
    RFC_V5,
    phases=BEFORE_LAUNCH,
    directions=TO_SHARED,
)

# --- PRESERVE on CoCo: after launch -------------------------------------------------------------------------
PRESERVE_NOT_AFTER_LAUNCH = Rule(
    COCO,
    PRESERVE.bit,
    REFUSED,
    "After launch the guest's key separates the two sides: neither reads what the other wrote in clear.",
    MICHAEL_29_APR,
    phases=AFTER_LAUNCH,
)

# --- PRESERVE on CoCo: never --------------------------------------------------------------------------------
PRESERVE_NOT_ON_COCO = Rule(
    COCO,
    PRESERVE.bit,
    REFUSED,
    "PRESERVE is about what both sides read at all times, which the guest's key rules out on SNP and TDX.",
    RFC_V4,
)

WITH_FLAGS = (
    UNSPECIFIED_KEEPS,
    UNSPECIFIED_SCRAMBLES,
    DEFAULT_IS_SHARED,
    ZERO_TO_SHARED,
    ZERO_NOT_TO_PRIVATE,
    PRESERVE_IN_CLEAR,
)
"""Rows that every revision with flags has in common."""

PRESERVE_AS_IN_V5 = (PRESERVE_UNTIL_POPULATE, PRESERVE_NOT_BACK_BEFORE_LAUNCH, PRESERVE_NOT_AFTER_LAUNCH)
"""PRESERVE on CoCo from RFC v5 on: to private before launch, and not otherwise."""


def _encrypting_rules(flag: Flag, before_launch: str | None, source: str) -> tuple[Rule, ...]:
    """Return the CoCo rows of a flag that asks cipher firmware to encrypt and decrypt after launch.

    Parameters
    ----------
    flag : Flag
        The flag passed after launch.
    before_launch : str or None
        Why it is refused before launch, in both directions; None if other rows cover to private.
    source : str
        Where the proposal is from.
    """
    refused_before = TO_SHARED if before_launch is None else TO_PRIVATE | TO_SHARED
    return (
        Rule(
            COCO,
            flag.bit,
            ENCRYPT,
            "Firmware that can encrypt in place makes the host's clear bytes readable to the guest.",
            source,
            firmware=CIPHER_FIRMWARE,
            phases=AFTER_LAUNCH,
            directions=TO_PRIVATE,
        ),
        Rule(
            COCO,
            flag.bit,
            DECRYPT,
            "Firmware that can decrypt in place makes the guest's bytes readable to the host.",
            source,
            firmware=CIPHER_FIRMWARE,
            phases=AFTER_LAUNCH,
            directions=TO_SHARED,
        ),
        Rule(
            COCO,
            flag.bit,
            REFUSED,
            "Today's firmware can't encrypt or decrypt a page in place after launch.",
            source,
            firmware=TODAYS_FIRMWARE,
            phases=AFTER_LAUNCH,
        ),
        Rule(
            COCO,
            flag.bit,
            REFUSED,
            PRESERVE_NOT_BACK_BEFORE_LAUNCH.why if before_launch is None else before_launch,
            source,
            phases=BEFORE_LAUNCH,
            directions=refused_before,
        ),
    )


PRESERVE_BY_PHASE = (
    PRESERVE_UNTIL_POPULATE,
    *_encrypting_rules(PRESERVE, None, MICHAEL_29_APR),
)
"""PRESERVE on CoCo where capabilities tell the phases apart: populate before launch, firmware after it."""

ALL_FLAGS_CAPABILITY = FlagsCapability(Capability.MEMORY_ATTRIBUTES2_FLAGS)
PRE_LAUNCH_CAPABILITY = FlagsCapability(Capability.MEMORY_ATTRIBUTES2_PRE_LAUNCH_FLAGS, BEFORE_LAUNCH)
POST_LAUNCH_CAPABILITY = FlagsCapability(Capability.MEMORY_ATTRIBUTES2_POST_LAUNCH_FLAGS, AFTER_LAUNCH)
FLAGS_AFTER_LAUNCH_CAPABILITY = FlagsCapability(Capability.MEMORY_ATTRIBUTES2_FLAGS, AFTER_LAUNCH)

# --- the revisions and proposals ----------------------------------------------------------------------------
_ROWS = (
    Abi(
        name="legacy",
        title="two backings, attributes of the VM by the VM-fd ioctl",
        source=API_4_141,
        flags=(),
        capabilities=(),
        rules=(LEGACY_FLIPS, LEGACY_DEFAULT_IS_SHARED),
        in_place_populate=False,
        legacy=True,
    ),
    Abi(
        name="v4",
        title="content flags ZERO and PRESERVE, PRESERVE not on CoCo",
        source=RFC_V4,
        flags=(ZERO, PRESERVE),
        capabilities=(ALL_FLAGS_CAPABILITY,),
        rules=(*WITH_FLAGS, PRESERVE_NOT_ON_COCO),
        error_offset_must_be_zero=True,
        in_place_populate=False,
    ),
    Abi(
        name="v4-squash",
        title="v4 with the [squash] commits: PRESERVE on CoCo before launch, both ways",
        source=MICHAEL_29_APR,
        flags=(ZERO, PRESERVE),
        capabilities=(ALL_FLAGS_CAPABILITY,),
        rules=(
            *WITH_FLAGS,
            PRESERVE_UNTIL_POPULATE,
            PRESERVE_BACK_BEFORE_LAUNCH,
            PRESERVE_NOT_AFTER_LAUNCH,
        ),
        error_offset_must_be_zero=True,
    ),
    Abi(
        name="v5",
        title="PRESERVE on CoCo to private before launch",
        source=RFC_V5,
        flags=(ZERO, PRESERVE),
        capabilities=(ALL_FLAGS_CAPABILITY,),
        rules=(*WITH_FLAGS, *PRESERVE_AS_IN_V5),
    ),
    Abi(
        name="v13",
        title="no content flags: v6 up to the series as applied",
        source=PATCH_V13,
        flags=(),
        capabilities=(),
        rules=(PLAIN_KEEPS,),
    ),
    Abi(
        name="before-launch",
        title="a separate flag for PRESERVE before launch",
        source=MICHAEL_29_APR,
        flags=(ZERO, PRESERVE, PRESERVE_BEFORE_LAUNCH),
        capabilities=(ALL_FLAGS_CAPABILITY,),
        rules=(
            *WITH_FLAGS,
            PRESERVE_NOT_ON_COCO,
            Rule(
                COCO,
                PRESERVE_BEFORE_LAUNCH.bit,
                KEEP,
                "The flag names the SNP and TDX flow: write in clear, convert, then populate in place.",
                MICHAEL_29_APR,
                phases=BEFORE_LAUNCH,
                directions=TO_PRIVATE,
            ),
            Rule(
                COCO,
                PRESERVE_BEFORE_LAUNCH.bit,
                REFUSED,
                PRESERVE_NOT_BACK_BEFORE_LAUNCH.why,
                RFC_V5,
                phases=BEFORE_LAUNCH,
                directions=TO_SHARED,
            ),
            Rule(
                COCO,
                PRESERVE_BEFORE_LAUNCH.bit,
                REFUSED,
                "The flag's own name restricts it to the time before launch.",
                MICHAEL_29_APR,
                phases=AFTER_LAUNCH,
            ),
            Rule(
                IN_CLEAR,
                PRESERVE_BEFORE_LAUNCH.bit,
                REFUSED,
                "Where private memory is in clear, PRESERVE holds at all times and needs no special form.",
                MICHAEL_29_APR,
            ),
        ),
    ),
    Abi(
        name="after-launch",
        title="a separate flag for PRESERVE after launch",
        source=MICHAEL_29_APR,
        flags=(ZERO, PRESERVE, PRESERVE_AFTER_LAUNCH),
        capabilities=(ALL_FLAGS_CAPABILITY,),
        rules=(
            *WITH_FLAGS,
            *PRESERVE_AS_IN_V5,
            Rule(
                IN_CLEAR,
                PRESERVE_AFTER_LAUNCH.bit,
                KEEP,
                "Other architectures may allow preserving both before and after launch.",
                MICHAEL_29_APR,
            ),
            *_encrypting_rules(
                PRESERVE_AFTER_LAUNCH,
                "The flag is for SNP and TDX once they can preserve after launch, and for that phase only.",
                MICHAEL_29_APR,
            ),
        ),
    ),
    Abi(
        name="cipher",
        title="a flag CIPHER: encrypt or decrypt while converting",
        source=ACKERLEY_24_APR,
        flags=(ZERO, PRESERVE, CIPHER),
        capabilities=(ALL_FLAGS_CAPABILITY,),
        rules=(
            *WITH_FLAGS,
            *PRESERVE_AS_IN_V5,
            *_encrypting_rules(
                CIPHER,
                "CIPHER is for SNP and TDX after populate; before launch populate does the encryption.",
                ACKERLEY_24_APR,
            ),
            Rule(
                IN_CLEAR,
                CIPHER.bit,
                REFUSED,
                "Platforms that do not encrypt stay with PRESERVE.",
                ACKERLEY_24_APR,
            ),
        ),
    ),
    Abi(
        name="two-caps",
        title="two capabilities, one per launch phase, for the same two flags",
        source=MICHAEL_29_APR,
        flags=(ZERO, PRESERVE),
        capabilities=(PRE_LAUNCH_CAPABILITY, POST_LAUNCH_CAPABILITY),
        rules=(*WITH_FLAGS, *PRESERVE_BY_PHASE),
    ),
    Abi(
        name="pre-cap",
        title="a pre-launch capability next to FLAGS, which then covers the time after launch",
        source=MICHAEL_29_APR_SECOND,
        flags=(ZERO, PRESERVE),
        capabilities=(PRE_LAUNCH_CAPABILITY, FLAGS_AFTER_LAUNCH_CAPABILITY),
        rules=(*WITH_FLAGS, *PRESERVE_BY_PHASE),
    ),
    Abi(
        name="tracking",
        title="PRESERVE re-scoped: contents do not change while tracking is updated",
        source=ACKERLEY_24_APR,
        flags=(ZERO, PRESERVE),
        capabilities=(ALL_FLAGS_CAPABILITY,),
        rules=(
            *WITH_FLAGS,
            Rule(
                SNP,
                PRESERVE.bit,
                KEEP,
                "Updating guest_memfd's tracking leaves DRAM alone; what the guest then reads is left open.",
                ACKERLEY_24_APR,
            ),
            Rule(
                TDX,
                PRESERVE.bit,
                KEEP,
                "Updating guest_memfd's tracking leaves DRAM alone; what the guest then reads is left open.",
                ACKERLEY_24_APR,
                directions=TO_PRIVATE,
            ),
            Rule(
                TDX,
                PRESERVE.bit,
                KEEP,
                "A page that leaves the S-EPT is cleared, so the range must hold no assigned page.",
                ACKERLEY_30_APR,
                directions=TO_SHARED,
                unless=ASSIGNED,
            ),
        ),
    ),
)

ABIS: Final[dict[str, Abi]] = {row.name: row for row in _ROWS}
"""Every revision and proposal by name, in the order of the table."""

ALIASES: Final[dict[str, str]] = {"merged": "v13", **{f"v{number}": "v13" for number in range(6, 13)}}
"""Other names that `get_abi` takes."""

DEFAULT_ABI: Final = "v5"
