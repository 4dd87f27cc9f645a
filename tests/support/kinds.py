"""VM types and planes for tests: from the package, so that a new one is tested everywhere."""

from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.policy import PLATFORMS
from gmemcore.uapi import PAGE_SIZE

P = PAGE_SIZE
PLANES = tuple(PLANE_NAMES)
VM_TYPES = tuple(map(str, PLATFORMS))
PRIVATE_VM_TYPES = tuple(str(row.vm_type) for row in PLATFORMS.values() if row.private_memory)
COCO = tuple(str(row.vm_type) for row in PLATFORMS.values() if row.coco)
IN_CLEAR = tuple(name for name in PRIVATE_VM_TYPES if name not in COCO)
