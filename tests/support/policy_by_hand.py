"""The policy of the specification (docs/spec.md, Revisions and proposals), written out by hand a second time.

Nothing here reads the package: the tests hold the package's tables against these, and the oracle decides by
them. Everything is a plain string or int, so that a row can be checked against the printed table by eye.
"""

from itertools import product

VM_TYPES = ("DEFAULT", "SW_PROTECTED", "SNP", "TDX", "PKVM")
COCO = ("SNP", "TDX")
FIRMWARES = ("today", "cipher")
PHASES = ("launching", "running")
DIRECTIONS = ("to_private", "to_shared")
FLAGS = {
    "NONE": 0,
    "ZERO": 1,
    "PRESERVE": 2,
    "PRESERVE_BEFORE_LAUNCH": 4,
    "PRESERVE_AFTER_LAUNCH": 8,
    "CIPHER": 16,
}
FLAG_NAMES = {bit: name for name, bit in FLAGS.items()}

# Which flags an abi knows.
KNOWN_FLAGS = {
    "legacy": (),
    "v4": ("ZERO", "PRESERVE"),
    "v4-squash": ("ZERO", "PRESERVE"),
    "v5": ("ZERO", "PRESERVE"),
    "v13": (),
    "before-launch": ("ZERO", "PRESERVE", "PRESERVE_BEFORE_LAUNCH"),
    "after-launch": ("ZERO", "PRESERVE", "PRESERVE_AFTER_LAUNCH"),
    "cipher": ("ZERO", "PRESERVE", "CIPHER"),
    "two-caps": ("ZERO", "PRESERVE"),
    "pre-cap": ("ZERO", "PRESERVE"),
    "tracking": ("ZERO", "PRESERVE"),
}
ABIS = tuple(KNOWN_FLAGS)

# The capabilities about flags an abi has, and the phases each of them covers.
BOTH_PHASES = ("launching", "running")
FLAG_CAPABILITIES = {
    "legacy": {},
    "v4": {"MEMORY_ATTRIBUTES2_FLAGS": BOTH_PHASES},
    "v4-squash": {"MEMORY_ATTRIBUTES2_FLAGS": BOTH_PHASES},
    "v5": {"MEMORY_ATTRIBUTES2_FLAGS": BOTH_PHASES},
    "v13": {},
    "before-launch": {"MEMORY_ATTRIBUTES2_FLAGS": BOTH_PHASES},
    "after-launch": {"MEMORY_ATTRIBUTES2_FLAGS": BOTH_PHASES},
    "cipher": {"MEMORY_ATTRIBUTES2_FLAGS": BOTH_PHASES},
    "two-caps": {
        "MEMORY_ATTRIBUTES2_PRE_LAUNCH_FLAGS": ("launching",),
        "MEMORY_ATTRIBUTES2_POST_LAUNCH_FLAGS": ("running",),
    },
    "pre-cap": {
        "MEMORY_ATTRIBUTES2_PRE_LAUNCH_FLAGS": ("launching",),
        "MEMORY_ATTRIBUTES2_FLAGS": ("running",),
    },
    "tracking": {"MEMORY_ATTRIBUTES2_FLAGS": BOTH_PHASES},
}
CAPABILITIES = (
    "MEMORY_ATTRIBUTES",
    "GUEST_MEMFD",
    "GUEST_MEMFD_FLAGS",
    "GUEST_MEMFD_MEMORY_ATTRIBUTES",
    "MEMORY_ATTRIBUTES2_FLAGS",
    "MEMORY_ATTRIBUTES2_PRE_LAUNCH_FLAGS",
    "MEMORY_ATTRIBUTES2_POST_LAUNCH_FLAGS",
)

# A row reads: to private before launch, to private after | to shared before launch, to shared after.
# "-" is EOPNOTSUPP; "KEEP?" is ok unless the range holds an assigned page.
ROWS = {
    "never": "-     -       | -     -",
    "zero": "-     -       | ZERO  ZERO",
    "always": "KEEP  KEEP    | KEEP  KEEP",
    "before launch": "KEEP  -       | KEEP  -",
    "before launch, to private": "KEEP  -       | -     -",
    "after launch by cipher": "-     ENCRYPT | -     DECRYPT",
    "before launch, then cipher": "KEEP  ENCRYPT | -     DECRYPT",
    "always, unless assigned": "KEEP  KEEP    | KEEP? KEEP?",
    "scramble": "SCRAMBLE SCRAMBLE | SCRAMBLE SCRAMBLE",
}

# PRESERVE on SNP and TDX: (with today's firmware, with the cipher firmware).
COCO_PRESERVE = {
    "v4": ("never", "never"),
    "v4-squash": ("before launch", "before launch"),
    "v5": ("before launch, to private", "before launch, to private"),
    "before-launch": ("never", "never"),
    "after-launch": ("before launch, to private", "before launch, to private"),
    "cipher": ("before launch, to private", "before launch, to private"),
    "two-caps": ("before launch, to private", "before launch, then cipher"),
    "pre-cap": ("before launch, to private", "before launch, then cipher"),
}
TRACKING_PRESERVE = {"SNP": "always", "TDX": "always, unless assigned"}
# The abi's own flag: on SNP and TDX (today, cipher), and on SW_PROTECTED and PKVM.
COCO_OWN_FLAG = {
    "PRESERVE_BEFORE_LAUNCH": ("before launch, to private", "before launch, to private"),
    "PRESERVE_AFTER_LAUNCH": ("never", "after launch by cipher"),
    "CIPHER": ("never", "after launch by cipher"),
}
SOFT_OWN_FLAG = {
    "PRESERVE_BEFORE_LAUNCH": "never",
    "PRESERVE_AFTER_LAUNCH": "always",
    "CIPHER": "never",
}


def _row_name(abi, vm_type, firmware, flag):
    """The row of a VM type with private memory and a flag that the abi knows (or none)."""
    column = FIRMWARES.index(firmware)
    if flag == "NONE":
        return "scramble" if vm_type == "SW_PROTECTED" and KNOWN_FLAGS[abi] else "always"
    if flag == "ZERO":
        return "zero"
    if vm_type not in COCO:
        return "always" if flag == "PRESERVE" else SOFT_OWN_FLAG[flag]
    if flag != "PRESERVE":
        return COCO_OWN_FLAG[flag][column]
    if abi == "tracking":
        return TRACKING_PRESERVE[vm_type]
    return COCO_PRESERVE[abi][column]


def _default_vm(abi, direction, flag):
    """DEFAULT has no private memory, and so no attribute to set."""
    if direction == "to_private" or abi == "v13":
        return ("EINVAL", None, None)
    return ("OK", "KEEP", None) if flag == "NONE" else ("EOPNOTSUPP", None, None)


def cell(abi, vm_type, firmware, phase, direction, flag):
    """(outcome, effect, unless) of one cell; for `legacy` of the VM-fd form, the only one it has."""
    if flag != "NONE" and flag not in KNOWN_FLAGS[abi]:
        return ("EINVAL", None, None)
    if vm_type == "DEFAULT":
        return _default_vm(abi, direction, flag)
    sides = ROWS[_row_name(abi, vm_type, firmware, flag)].split("|")
    answer = sides[DIRECTIONS.index(direction)].split()[PHASES.index(phase)]
    if answer == "-":
        return ("EOPNOTSUPP", None, None)
    return ("OK", answer.rstrip("?"), "assigned" if answer.endswith("?") else None)


def _flags_capability(abi, name, vm_type, firmware):
    bits = 0
    for phase in FLAG_CAPABILITIES[abi].get(name, ()):
        for flag in KNOWN_FLAGS[abi]:
            if any(cell(abi, vm_type, firmware, phase, d, flag)[0] == "OK" for d in DIRECTIONS):
                bits |= FLAGS[flag]
    return bits


def capability(abi, name, vm_type, firmware):
    """What check_cap answers; `vm_type` None asks without a VM: the union over VM types, today's firmware."""
    if vm_type is None:
        bits = 0
        for any_type in VM_TYPES:
            bits |= capability(abi, name, any_type, "today")
        return bits
    has_private = vm_type != "DEFAULT"
    if name == "GUEST_MEMFD":
        return 1
    if name == "GUEST_MEMFD_FLAGS":
        return 1 if abi == "legacy" and has_private else 3
    if name == "MEMORY_ATTRIBUTES":
        return 8 if abi == "legacy" and has_private else 0
    if name == "GUEST_MEMFD_MEMORY_ATTRIBUTES":
        return 8 if abi != "legacy" and has_private else 0
    return _flags_capability(abi, name, vm_type, firmware)


def requests(abi):
    """Every request with flags that the abi knows: VM type, firmware, phase, attributes, flag."""
    for vm_type, firmware, phase, attributes in product(VM_TYPES, FIRMWARES, PHASES, (8, 0)):
        if vm_type == "DEFAULT" and (attributes or phase == "running"):
            continue
        for flag in ("NONE", *KNOWN_FLAGS[abi]):
            yield vm_type, firmware, phase, attributes, FLAGS[flag]
