"""A key that seals, and the one that opens."""

from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey, generate_identity, parse_key


def identity_key() -> tuple[EncryptionKey, DecryptionKey]:
    seals = parse_key(generate_identity()[1], purpose="encryption", where="environment")
    assert seals is not None
    assert seals.opens is not None
    return seals, seals.opens


SEALS, OPENS = identity_key()
