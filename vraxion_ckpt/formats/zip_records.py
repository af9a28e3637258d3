"""The fixed parts of the records of zip archives.

Format: PKWARE APPNOTE 6.3.10 (zip and zip64). The names of fields are in section 4.3. Imports without torch.
"""

from __future__ import annotations

import struct

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64_LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
# Flags of a member: its sizes and checksum follow its bytes; its name is UTF-8.
HAS_DESCRIPTOR, UTF8_NAME = 0x0008, 0x0800
