"""What can happen to a file."""


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[:9])


def emptied(path):
    path.write_bytes(b"")
