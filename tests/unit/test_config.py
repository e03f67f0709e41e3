"""Settings that cannot be used end in a sentence that names the variable."""

import pytest

from controlplane.config import Config, load_config


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("PENSTOCK_PORT", "99999", "PENSTOCK_PORT: Input should be less than or equal to 65535"),
        ("PENSTOCK_ALLOWED_HOSTS", "example.org", "PENSTOCK_ALLOWED_HOSTS must be a JSON list"),
        ("PENSTOCK_PROT", "8001", "Unknown setting PENSTOCK_PROT"),
        ("PENSTOCK_UPSTREAM", "http://127.0.0.1:11434/v1", "PENSTOCK_UPSTREAM: String should match"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=sentence):
        load_config()


def test_several_models_get_a_worker_each() -> None:
    config = Config.model_construct(model="small, large", gpu_workers=1)
    assert (config.models, config.num_gpu_processes) == (["small", "large"], 2)
    assert Config.model_construct(model="", gpu_workers=3).num_gpu_processes == 3
    assert Config.model_construct(model="a,b", gpu_workers=0).num_gpu_processes == 0


def test_an_upstream_is_named_with_or_without_its_own_name_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, parts in (
        ("m=http://host:1/v1", ("m", "", "http://host:1/v1")),
        ("llama=llama3.2:3b@https://host/v1", ("llama", "llama3.2:3b", "https://host/v1")),
    ):
        monkeypatch.setenv("PENSTOCK_UPSTREAM", value)
        assert load_config().upstream_parts == parts
