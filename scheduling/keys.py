"""Every Redis key, in one place. Keys of a model's queue share a hash tag, as do those of a tenant (Redis Cluster)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under a prefix, which keeps two installations (or two tests) on one server apart."""

    prefix: str = "penstock"

    def queue(self, model: str) -> str:
        """Start of the keys of a model's fleet queue; scripts append `:name`."""
        return f"{{{self.prefix}:q:{model}}}"

    def request(self, model: str, request_id: str) -> str:
        """Hash: `body` (InferenceRequest), `state`, `attempt`, `output` (text, once finished), `finish` (Finish)."""
        return f"{self.queue(model)}:req:{request_id}"

    def tokens(self, model: str, request_id: str) -> str:
        """String: the journal, output token ids as little-endian int32."""
        return f"{self.queue(model)}:tok:{request_id}"

    def logprobs(self, model: str, request_id: str) -> str:
        """Hash with a time to live: an output token's number -> log probabilities from there on."""
        return f"{self.queue(model)}:logprobs:{request_id}"

    def cancels(self, model: str, owner: str) -> str:
        """List: ids that the engine process `owner` should stop."""
        return f"{self.queue(model)}:cancels:{owner}"

    def bell(self, model: str) -> str:
        """List: one element wakes one idle engine process."""
        return f"{self.queue(model)}:bell"

    def tenant(self, tenant: str) -> str:
        """Start of the keys of a tenant's limits (its idempotency keys too: `:key:DIGEST`); scripts append `:name`."""
        return f"{{{self.prefix}:t:{tenant}}}"

    def replies(self, web: str) -> str:
        """Stream: token updates for one web process; field `m` is a MessagePack list of SequenceUpdate."""
        return f"{self.prefix}:replies:{web}"

    @property
    def webs(self) -> str:
        """Sorted set: web process -> unix time at which its heartbeat runs out."""
        return f"{self.prefix}:webs"

    @property
    def awaits(self) -> str:
        """Sorted set: request with an idempotency key -> unix time at which the last web process stops waiting for it.

        Such a request's `reply_to` is its own id, so its updates have a stream of their own.
        """
        return f"{self.prefix}:awaits"

    def replica(self, replica: str) -> str:
        """String with a time to live: ReplicaStatus."""
        return f"{self.prefix}:replica:{replica}"

    @property
    def replicas(self) -> str:
        """Sorted set: replica -> unix time last heard."""
        return f"{self.prefix}:replicas"

    @property
    def alerts(self) -> str:
        """String with a time to live: JSON list of [rule, severity, number of firing alerts]."""
        return f"{self.prefix}:alerts"

    @property
    def ops(self) -> str:
        """String with a time to live: the ops worker has lately run a periodic task."""
        return f"{self.prefix}:ops"

    @property
    def deployments(self) -> str:
        """Hash: model -> DeploymentSpec (JSON)."""
        return f"{self.prefix}:deployments"

    @property
    def plan(self) -> str:
        """Hash: replica -> PlannedReplica (JSON), and `:revision` (`inference.plan`)."""
        return f"{self.prefix}:plan"

    def machine(self, machine: str) -> str:
        """String with a time to live: Machine (`inference.plan`)."""
        return f"{self.prefix}:machine:{machine}"

    def machine_holder(self, machine: str) -> str:
        """String with a time to live: which supervisor goes by this machine's name."""
        return f"{self.prefix}:machine_holder:{machine}"

    @property
    def machines(self) -> str:
        """Sorted set: machine -> unix time last heard."""
        return f"{self.prefix}:machines"

    @property
    def models(self) -> str:
        """Set: every model that was ever deployed; requests of one that was withdrawn must still come to an end."""
        return f"{self.prefix}:models"

    @property
    def history(self) -> str:
        """Stream: field `m` is a MessagePack list of HistoryEvent."""
        return f"{self.prefix}:history"

    def sign_in(self, kind: str, digest: str) -> str:
        """Counter with a time to live: attempts to sign in, by `both` account and address, `account`, or `address`."""
        return f"{self.prefix}:sign_in:{kind}:{digest}"

    @property
    def told(self) -> str:
        """Channel: the name of a replica that has a new status. Who misses a word reads it a little later."""
        return f"{self.prefix}:told"

    @property
    def config_version(self) -> str:
        """Counter: bumped when tenants, keys, quotas or deployments changed; web processes reload on a new value."""
        return f"{self.prefix}:config_version"

    @property
    def backpressure(self) -> str:
        """Hash: model -> the level in force, one for all web processes (`inference.messages.SharedLevel`)."""
        return f"{self.prefix}:backpressure"

    @property
    def refusals(self) -> str:
        """Hash: `model|tenant|reason` -> count."""
        return f"{self.prefix}:refusals"

    @property
    def turned_away(self) -> str:
        """Hash: `model|tenant|priority` -> count of those refused for want of capacity: misses of an SLA."""
        return f"{self.prefix}:turned_away"
