"""Who calls: an API key looked up in the directory, its tenant, and the priority it may ask for."""

from dataclasses import dataclass

from inference.directory import Directory, KeyConfig, TenantConfig
from inference.gateway.errors import Forbidden, InvalidKey, InvalidRequest, Unavailable
from scheduling.core.request import Priority


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated key and its tenant."""

    key: KeyConfig
    tenant: TenantConfig

    def choose_priority(self, asked: int | str | None) -> int:
        """The priority to use: normal, or the key's ceiling where that is lower, unless the request names one.

        Raises InvalidRequest for what is no priority, Forbidden above the ceiling.
        """
        ceiling = max(self.key.max_priority, self.tenant.max_priority)
        if asked is None:
            return max(Priority.NORMAL, ceiling)
        priority = _read_priority(asked)
        if priority < ceiling:
            raise Forbidden(
                f"Priority {priority.name.lower()} is above this key's ceiling, {Priority(ceiling).name.lower()}.",
                param="priority",
                code="priority_not_allowed",
            )
        return priority


def find_caller(authorization: bytes | str, directory: Directory) -> Caller:
    """The caller of an `Authorization` header.

    Raises InvalidKey, Forbidden where the tenant is suspended, or Unavailable before the database was ever read:
    that no key is known then does not make this one wrong.
    """
    header = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization
    scheme, _, plaintext = header.partition(" ")
    if scheme.lower() != "bearer" or not plaintext.strip():
        raise InvalidKey("Send your API key in the header `Authorization: Bearer KEY`.", code="missing_api_key")
    if not directory.is_read:
        raise Unavailable("Tenants and keys have not been read from the database yet.")
    key = directory.find_key(plaintext.strip())
    tenant = directory.tenants.get(key.tenant) if key else None
    if key is None or tenant is None:
        raise InvalidKey("The API key is unknown or was revoked.")
    if tenant.suspended:
        raise Forbidden("This tenant is suspended.", code="tenant_suspended")
    return Caller(key, tenant)


def _read_priority(asked: int | str) -> Priority:
    try:
        if isinstance(asked, str):
            return Priority[asked.upper()]
        return Priority(asked)
    except (KeyError, ValueError):
        names = ", ".join(f"{p.name.lower()} ({p.value})" for p in Priority)
        raise InvalidRequest(f"priority must be one of {names}.", param="priority") from None
