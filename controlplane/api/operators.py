"""What the operator's pages show and do, as an API: one router for them all."""

from ninja import Router

from controlplane.api import revisions

router = Router()
router.add_router("", revisions.router)
