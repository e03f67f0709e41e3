/* A stand-in for NVIDIA's libnvidia-ml.so.1. It reads what to say from the file that NVML_STAND_IN names, at every
   call: lines of `name value`. A name that is missing is not supported. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };

typedef struct device { int is_mig, is_second; } device;
static device whole = {0, 0}, slice = {1, 0}, second = {0, 1};

typedef struct { unsigned long long total, free, used; } memory_info;
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned pid; unsigned long long bytes; unsigned instance, compute; } process_info;

/* The text after `name `, or NULL. */
static const char *look_up(const char *name) {
    static __thread char line[256];
    const char *path = getenv("NVML_STAND_IN");
    FILE *file = path ? fopen(path, "r") : NULL;
    const char *found = NULL;
    size_t length = strlen(name);
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, name, length) == 0 && line[length] == ' ') {
            line[strcspn(line, "\n")] = 0;
            found = line + length + 1;
            break;
        }
    }
    if (file) fclose(file);
    return found;
}

static unsigned long long number(const char *name) {
    const char *text = look_up(name);
    return text ? strtoull(text, NULL, 10) : 0;
}

/* Every call hangs while the file says so, and fails with `error` where it names one. */
static int enter(void) {
    while (number("hang")) usleep(10000);
    return (int)number("error");
}

#define ENTER() do { int error_ = enter(); if (error_) return error_; } while (0)

static int give(const char *name, unsigned *out) {
    ENTER();
    if (!look_up(name)) return NOT_SUPPORTED;
    *out = (unsigned)number(name);
    return SUCCESS;
}

static int give_text(const char *name, char *out, unsigned size) {
    ENTER();
    const char *text = look_up(name);
    if (!text) return NOT_SUPPORTED;
    snprintf(out, size, "%s", text);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return (int)number("init_error"); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int error) { return error == GPU_IS_LOST ? "GPU is lost" : "some error"; }

/* A second GPU, with all that the first one has but its UUID, is there where the file has a `second_uuid`. */
int nvmlDeviceGetCount_v2(unsigned *out) { ENTER(); *out = look_up("second_uuid") ? 2 : 1; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **out) {
    ENTER();
    if (index > 1 || (index && !look_up("second_uuid"))) return NOT_FOUND;
    *out = index ? &second : &whole;
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device **out) {
    ENTER();
    const char *known = look_up("uuid");
    if (known && strcmp(uuid, known) == 0) { *out = &whole; return SUCCESS; }
    known = look_up("mig_uuid");
    if (known && strcmp(uuid, known) == 0) { *out = &slice; return SUCCESS; }
    return NOT_FOUND;
}

int nvmlDeviceIsMigDeviceHandle(device *of, unsigned *out) { ENTER(); *out = (unsigned)of->is_mig; return SUCCESS; }
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device *of, device **out) {
    (void)of; ENTER(); *out = &whole; return SUCCESS;
}
int nvmlDeviceGetGpuInstanceId(device *of, unsigned *out) { return of->is_mig ? give("instance", out) : NOT_SUPPORTED; }
int nvmlDeviceGetComputeInstanceId(device *of, unsigned *out) { return of->is_mig ? give("compute", out) : NOT_SUPPORTED; }
int nvmlDeviceGetName(device *of, char *out, unsigned size) { (void)of; return give_text("name", out, size); }
int nvmlDeviceGetUUID(device *of, char *out, unsigned size) {
    return give_text(of->is_mig ? "mig_uuid" : of->is_second ? "second_uuid" : "uuid", out, size);
}

int nvmlDeviceGetUtilizationRates(device *of, utilization *out) {
    return of->is_mig ? NOT_SUPPORTED : give("utilization", &out->gpu);
}

int nvmlDeviceGetMemoryInfo(device *of, memory_info *out) {
    ENTER();
    out->total = number(of->is_mig ? "mig_memory_total" : "memory_total");
    out->used = number(of->is_mig ? "mig_memory_used" : "memory_used");
    out->free = out->total - out->used;
    return SUCCESS;
}

/* What the whole GPU alone has is refused for an instance, as NVIDIA's library does. */
#define WHOLE(of) do { if ((of)->is_mig) return NOT_SUPPORTED; } while (0)

int nvmlDeviceGetTemperature(device *of, int sensor, unsigned *out) {
    (void)sensor; WHOLE(of); return give("temperature", out);
}
int nvmlDeviceGetPowerUsage(device *of, unsigned *out) { WHOLE(of); return give("power_mw", out); }
int nvmlDeviceGetEnforcedPowerLimit(device *of, unsigned *out) { WHOLE(of); return give("power_limit_mw", out); }
int nvmlDeviceGetClockInfo(device *of, int type, unsigned *out) {
    WHOLE(of); return give(type == 1 ? "sm_clock" : "memory_clock", out);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device *of, unsigned long long *out) {
    WHOLE(of);
    unsigned mask;
    int error = give("throttle", &mask);
    *out = mask;
    return error;
}

int nvmlDeviceGetTotalEccErrors(device *of, int kind, int counter, unsigned long long *out) {
    (void)counter;
    WHOLE(of);
    unsigned count;
    int error = give(kind == 0 ? "ecc_corrected" : "ecc_uncorrected", &count);
    *out = count;
    return error;
}

/* `processes 17:1000 18:2000`; a pid of 0 is the caller's own. */
int nvmlDeviceGetComputeRunningProcesses_v3(device *of, unsigned *count, process_info *out) {
    (void)of;
    ENTER();
    const char *text = look_up("processes");
    unsigned room = *count, found = 0, pid;
    unsigned long long bytes;
    int used;
    for (; text && sscanf(text, " %u:%llu%n", &pid, &bytes, &used) == 2; text += used, found++)
        if (out && found < room) out[found] = (process_info){pid ? pid : (unsigned)getpid(), bytes, 0, 0};
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}
