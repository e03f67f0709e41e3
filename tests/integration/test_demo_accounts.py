"""The demo's accounts: what `make up` prints lets somebody in, on whatever database it runs."""

from pathlib import Path

import pytest
from django.contrib.auth.models import User

from controlplane.config import Config
from controlplane.demo import prepare_accounts, secrets_path
from scheduling.models import ServiceLevel, Tenant

pytestmark = pytest.mark.django_db


def config_of(var: Path, database_url: str = "") -> Config:
    return Config.model_construct(var=var, database_url=database_url)


def test_the_accounts_stay_the_same_from_start_to_start(installation: Config, tmp_path: Path) -> None:
    first = prepare_accounts(config_of(tmp_path))
    assert first is not None
    assert User.objects.get(username="operator").check_password(first.password)
    assert prepare_accounts(config_of(tmp_path)) == first


def test_every_priority_has_a_target_at_first_and_what_an_administrator_took_away_stays_away(
    installation: Config, tmp_path: Path
) -> None:
    prepare_accounts(config_of(tmp_path))
    assert list(ServiceLevel.objects.filter(tenant=None).values_list("priority", flat=True)) == list(range(6))
    ServiceLevel.objects.all().delete()
    prepare_accounts(config_of(tmp_path))
    assert not ServiceLevel.objects.exists()


def test_a_start_on_another_database_and_back_finds_the_first_one_s_secrets(
    installation: Config, tmp_path: Path
) -> None:
    first = prepare_accounts(config_of(tmp_path))
    accounts = list(User.objects.values()), list(Tenant.objects.values_list("name", flat=True))
    User.objects.all().delete()  # another database knows none of them
    Tenant.objects.all().delete()
    other = prepare_accounts(config_of(tmp_path, "postgres://host/other"))
    assert first is not None
    assert other is not None
    assert other.password != first.password
    assert first.password not in secrets_path(config_of(tmp_path)).read_text()
    User.objects.all().delete()
    User.objects.bulk_create(User(**row) for row in accounts[0])
    back = prepare_accounts(config_of(tmp_path))
    assert back is not None
    assert back.password == first.password


def test_a_password_that_the_operator_chose_is_neither_reset_nor_printed(installation: Config, tmp_path: Path) -> None:
    prepare_accounts(config_of(tmp_path))
    user = User.objects.get(username="operator")
    user.set_password("of my own")
    user.save()
    for _ in range(2):
        again = prepare_accounts(config_of(tmp_path))
        assert again is not None
        assert again.password == ""
    user.refresh_from_db()
    assert user.check_password("of my own")
