"""Claims about the authorship of checkpoints: pinned digests, and signatures."""

import base64
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from mal_train.cli import main
from mal_train.core.errors import Altered, CheckpointError, ConfigError, OutputError, Untrusted
from mal_train.kernel.checkpoint import encrypted_file
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.trust import (
    TrustPolicy,
    read_signing_key,
    sign_file,
    signature_path,
    write_signing_key,
)
from tests.mal_train.kernel.checkpoint.checkpoints import KEYS, resume_checkpoint, weights, weights_checkpoint
from tests.mal_train.kernel.checkpoint.key_pair import DECRYPTION_KEY, ENCRYPTION_KEY

ENCRYPTED_KEY = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"


class Signed:
    """A checkpoint with a signature, and the public key of its signer."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "a.malckpt"
        save_checkpoint(self.path, weights_checkpoint(), ENCRYPTION_KEY)
        self.key_file = folder / "signing.pem"
        self.signer = write_signing_key(self.key_file)
        self.signature, _ = sign_file(self.path, read_signing_key(f"file:{self.key_file}", "key"))

    def load(self, *signers: str, sha256: tuple[str, ...] = ()) -> None:
        load_checkpoint(self.path, DECRYPTION_KEY, trust=TrustPolicy(sha256, signers or (self.signer,)))


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return Signed(tmp_path)


def other_signer(folder: Path) -> str:
    return write_signing_key(folder / "other.pem")


def test_a_file_sealed_by_another_author_for_the_public_recipient_is_refused(signed: Signed) -> None:
    pinned = hashlib.sha256(signed.path.read_bytes()).hexdigest()
    signed.load(sha256=(pinned,))
    zeros = {name: torch.zeros_like(weight) for name, weight in weights().items()}
    save_checkpoint(signed.path, weights_checkpoint(weights=zeros), ENCRYPTION_KEY)
    load_checkpoint(signed.path, DECRYPTION_KEY)  # encryption alone does not tell
    with pytest.raises(Untrusted):
        signed.load()
    with pytest.raises(Untrusted):
        load_checkpoint(signed.path, DECRYPTION_KEY, trust=TrustPolicy((pinned,)))


def test_any_of_several_trusted_signers_is_enough(signed: Signed, tmp_path: Path) -> None:
    other = other_signer(tmp_path)
    signed.load(other, signed.signer)
    with pytest.raises(Untrusted, match="not a trusted signer"):
        signed.load(other)


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda text: text.replace(old, new)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"",
        lambda text: text[:-3],
        lambda text: text + b"more\n",
        lambda text: b"\xff" * 10_000,
        replaced(b"signature/1", b"signature/2"),
        replaced(b"\n", b"\r\n"),
        replaced(b"sha256 ", b"sha256 0"),
        lambda text: text[:-10] + b"AAAAAAA==\n",
    ],
    ids=range(8),
)
def test_a_damaged_signature_is_refused(signed: Signed, change: Callable[[bytes], bytes]) -> None:
    signed.signature.write_bytes(change(signed.signature.read_bytes()))
    with pytest.raises(Untrusted):
        signed.load()


def test_a_missing_signature_is_refused(signed: Signed) -> None:
    signed.signature.unlink()
    with pytest.raises(Untrusted, match="mal-train sign"):
        signed.load()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["signature", "path"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(signed: Signed, name: str) -> None:
    # Nobody writes into the pipe: to open it as a file would wait for ever.
    place: Path = getattr(signed, name)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(CheckpointError, match="not a regular file"):
        signed.load()
    with pytest.raises(CheckpointError, match="not a regular file"):
        TrustPolicy(signers=(signed.signer,)).check_file(signed.path)


def test_a_signature_of_another_key_under_a_trusted_name_is_refused(signed: Signed, tmp_path: Path) -> None:
    other = other_signer(tmp_path)
    text = signed.signature.read_text()
    signed.signature.write_text(text.replace(signed.signer, other))
    with pytest.raises(Untrusted, match="not valid"):
        signed.load(other)


def test_a_signature_of_other_content_of_the_same_key_is_refused(signed: Signed) -> None:
    """A signature over the bare digest, as another program may make it, does not count: the message has a domain."""
    key = read_signing_key(f"file:{signed.key_file}", "key")
    digest = hashlib.sha256(signed.path.read_bytes()).digest()
    lines = signed.signature.read_text().splitlines()
    lines[3] = f"signature {base64.b64encode(key.sign(digest)).decode()}"
    signed.signature.write_text("\n".join(lines) + "\n")
    with pytest.raises(Untrusted, match="not valid"):
        signed.load()


def test_a_signature_follows_the_documented_format(signed: Signed) -> None:
    first, signer, sha256, signature = signed.signature.read_text().splitlines()
    digest = hashlib.sha256(signed.path.read_bytes())
    assert (first, sha256) == ("mal-signature/1", f"sha256 {digest.hexdigest()}")
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(signer.removeprefix("signer ed25519:")))
    message = b"mask-auto-labeler checkpoint signature 1\n" + digest.digest()
    public.verify(base64.b64decode(signature.removeprefix("signature ")), message)


def test_nothing_of_an_untrusted_file_is_parsed(signed: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object, **__: object) -> None:
        raise AssertionError("parsed before it was trusted")

    signed.signature.unlink()
    monkeypatch.setattr(encrypted_file, "read_encryption_info", parse)
    with pytest.raises(Untrusted):
        signed.load()


def test_a_file_exchanged_after_its_check_is_not_the_one_that_is_read(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = TrustPolicy.check

    def exchange(self: TrustPolicy, path: Path, file: object) -> str | None:
        monkeypatch.undo()
        digest = check(self, path, file)  # type: ignore[arg-type]
        path.rename(path.with_suffix(".old"))
        save_checkpoint(path, weights_checkpoint(weights={}), ENCRYPTION_KEY)
        return digest

    monkeypatch.setattr(TrustPolicy, "check", exchange)
    loaded = load_checkpoint(signed.path, DECRYPTION_KEY, trust=TrustPolicy((), (signed.signer,)))
    assert loaded.weights.keys() == weights().keys()


def test_a_file_changed_in_place_after_its_check_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "a.malckpt", tmp_path / "b.malckpt"
    save_checkpoint(path, weights_checkpoint(), None)
    save_checkpoint(other, weights_checkpoint(provenance={"boxes": 13, "licence": "Apache-2.0"}), None)
    policy, check = TrustPolicy((hashlib.sha256(path.read_bytes()).hexdigest(),)), TrustPolicy.check

    def change(self: TrustPolicy, path: Path, file: object) -> str | None:
        digest = check(self, path, file)  # type: ignore[arg-type]
        path.write_bytes(other.read_bytes())
        return digest

    monkeypatch.setattr(TrustPolicy, "check", change)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, None, trust=policy)


def test_content_that_changes_during_the_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.malckpt"
    save_checkpoint(path, weights_checkpoint(), None)
    policy = TrustPolicy((hashlib.sha256(path.read_bytes()).hexdigest(),))
    monkeypatch.setattr(TrustPolicy, "check", lambda *_: "0" * 64)
    with pytest.raises(Altered, match="changed while it was read"):
        load_checkpoint(path, None, trust=policy)


def test_the_signature_of_a_linked_checkpoint_lies_beside_the_file(signed: Signed) -> None:
    link = signed.path.with_name("latest.malckpt")
    link.symlink_to(signed.path.name)
    assert signature_path(link) == signed.signature
    load_checkpoint(link, DECRYPTION_KEY, trust=TrustPolicy((), (signed.signer,)))


@pytest.mark.parametrize(
    "policy",
    [{"sha256": ("abc",)}, {"sha256": ("A" * 64,)}, {"signers": ("age1abc",)}, {"signers": ("ed25519:" + "A" * 43,)}],
)
def test_a_malformed_policy_is_refused(policy: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError):
        TrustPolicy(**policy)


@pytest.mark.parametrize("sign", [0, 0x80])
@pytest.mark.parametrize(
    "y",
    [
        *("00" * 32, "01" + "00" * 31, "ec" + "ff" * 30 + "7f", "ed" + "ff" * 30 + "7f", "ee" + "ff" * 30 + "7f"),
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    ],
)
def test_a_public_key_for_which_anybody_can_sign_is_refused(y: str, sign: int) -> None:
    raw = bytes.fromhex(y)
    key = base64.b64encode(raw[:31] + bytes([raw[31] | sign])).decode()
    with pytest.raises(ConfigError, match="anybody"):
        TrustPolicy(signers=(f"ed25519:{key}",))


@pytest.mark.parametrize("content", ["", "no key", ENCRYPTED_KEY, ENCRYPTED_KEY.replace("ENCRYPTED ", "")])
def test_the_error_of_a_malformed_signing_key_does_not_quote_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(ConfigError) as raised:
        read_signing_key(f"file:{tmp_path / 'key'}", "--key")
    assert "AAAA" not in str(raised.value)
    with pytest.raises(ConfigError, match="file:PATH"):
        read_signing_key(content or "literal", "--key")


class TestCommands:
    @KEYS
    def test_encryption_is_changed_and_the_content_is_not(
        self, tmp_path: Path, encryption_key: object, decryption_key: object
    ) -> None:
        del decryption_key
        identity, other = tmp_path / "identity", tmp_path / "other"
        assert main(["keygen", "-o", str(identity)]) == main(["keygen", "-o", str(other)]) == 0
        plain, sealed, again, back = (str(tmp_path / f"{name}.malckpt") for name in "abcd")
        content = resume_checkpoint() if encryption_key else weights_checkpoint()
        save_checkpoint(Path(plain), content, None)
        assert main(["encrypt", plain, "-o", sealed, "--to", f"file:{identity}"]) == 0
        assert main(["rekey", sealed, "-o", again, "--key", f"file:{identity}", "--to", f"file:{other}"]) == 0
        assert main(["decrypt", again, "-o", back, "--key", f"file:{identity}"]) == CheckpointError.exit_code
        assert main(["decrypt", again, "-o", back, "--key", f"file:{other}"]) == 0
        assert Path(back).read_bytes() == Path(plain).read_bytes()
        assert stat.S_IMODE(os.stat(back).st_mode) == 0o600

    def test_no_command_overwrites_a_file(self, tmp_path: Path, signed: Signed) -> None:
        plain, target, identity = tmp_path / "p.malckpt", tmp_path / "target", tmp_path / "identity"
        main(["keygen", "-o", str(identity)])
        save_checkpoint(plain, weights_checkpoint(), None)
        target.write_text("kept")
        commands = (
            ["encrypt", str(plain), "-o", str(target), "--to", f"file:{identity}"],
            ["keygen", "--signing", "-o", str(target)],
            ["keygen", "-o", str(target)],
            ["sign", str(signed.path), "--key", f"file:{signed.key_file}"],
        )
        assert [main(command) for command in commands] == [OutputError.exit_code] * len(commands)
        assert target.read_text() == "kept"

    def test_a_damaged_file_is_not_copied(self, tmp_path: Path) -> None:
        plain, target, identity = tmp_path / "p.malckpt", tmp_path / "target", tmp_path / "identity"
        main(["keygen", "-o", str(identity)])
        save_checkpoint(plain, weights_checkpoint(), None)
        content = bytearray(plain.read_bytes())
        content[-20] ^= 1
        plain.write_bytes(content)
        assert main(["encrypt", str(plain), "-o", str(target), "--to", f"file:{identity}"]) == Altered.exit_code
        assert not target.exists()

    def test_a_secret_on_the_command_line_is_refused(
        self, tmp_path: Path, signed: Signed, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = str(tmp_path / "target")
        for command in (
            ["encrypt", str(signed.path), "-o", target, "--to", "hunter2"],
            ["decrypt", str(signed.path), "-o", target, "--key", "hunter2"],
            ["sign", str(signed.path), "--key", "hunter2"],
        ):
            assert main(command) == ConfigError.exit_code
        assert "hunter2" not in capsys.readouterr().err

    def test_sign_and_verify_agree(self, tmp_path: Path, signed: Signed, capsys: pytest.CaptureFixture[str]) -> None:
        signed.signature.unlink()
        assert main(["keygen", "--signing", "-o", str(tmp_path / "new.pem")]) == 0
        signer = capsys.readouterr().out.splitlines()[-1]
        assert stat.S_IMODE((tmp_path / "new.pem").stat().st_mode) == 0o600
        assert main(["sign", str(signed.path), "--key", f"file:{tmp_path / 'new.pem'}"]) == 0
        digest = hashlib.sha256(signed.path.read_bytes()).hexdigest()
        verify = ["verify", str(signed.path)]
        assert main([*verify, "--signer", signed.signer, "--signer", signer]) == 0
        assert main([*verify, "--signer", signer, "--sha256", digest]) == 0
        assert main([*verify, "--sha256", digest]) == 0
        assert digest in capsys.readouterr().out
        assert main([*verify, "--signer", signed.signer]) == Untrusted.exit_code
        assert main([*verify, "--sha256", "0" * 64]) == Untrusted.exit_code
        assert main(verify) == ConfigError.exit_code
