"""Real devices: who may take part, what runs where, and what is to be seen of it.

======================  =================================================================
``files``               the fleet's directory on the server, a device's directory
``identity``            CA, server certificate, device keys
``bundle``              what goes to a device, and how a device takes it in
``gateway``             what devices may ask of the server: the Fleet API and their model
``superlink``           Flower's SuperLink behind the gateway
``control``             registering devices, as the server's administrator
``link`` ``device``     a device: one process that waits for work
``trainer``             the process that keeps torch and the data, while there is work
``profile``             what a device has measured of itself at work
``serverapp``           a run: the process that ``fedq fleet run`` is
``sampling``            which devices a run asks
``releases``            models for devices: exported, signed, which device should run which
``artefacts``           models on a device: fetched, checked, swapped in
``units``               systemd units
``status`` ``doctor``   what is to be seen, and what is wrong
``health`` ``bench``    what a device says of itself, what it can do
``remote``              installing and enrolling over ssh
``wheelhouse``          wheels for devices without a network
``meter``               a proxy that counts bytes, for the demo, tests and benchmarks
``demo``                all of it on one machine
======================  =================================================================

All that is not public in Flower and used here is in ``flower``, which names the version it knows.
"""
