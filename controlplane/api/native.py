"""The native API: submit and poll requests, read queues, replicas and policies, switch a policy."""

from ninja import NinjaAPI

api = NinjaAPI(title="Penstock", version="1", docs_url="/docs", urls_namespace="native")
