"""A key pair for tests: an encryption key and the matching decryption key."""

from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey, generate_identity, parse_key


def identity_key() -> tuple[EncryptionKey, DecryptionKey]:
    encryption_key = parse_key(generate_identity()[1], purpose="encryption", source="environment")
    assert encryption_key is not None
    assert encryption_key.decryption_key is not None
    return encryption_key, encryption_key.decryption_key


ENCRYPTION_KEY, DECRYPTION_KEY = identity_key()
