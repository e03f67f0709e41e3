"""What the operator's pages show and do, as an API: one router for them all."""

from ninja import Router

from controlplane.api import alerts, audit, history, offline_work, request_log, revisions, service, tenants, what_if

router = Router()
router.add_router("", revisions.router)
router.add_router("", request_log.router)
router.add_router("", history.router)
router.add_router("", service.router)
router.add_router("", tenants.router)
router.add_router("", audit.router)
router.add_router("", what_if.router)
router.add_router("", alerts.router)
router.add_router("", offline_work.router)
