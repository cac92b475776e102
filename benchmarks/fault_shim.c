/* Makes one call to the system fail: the n-th of its kind on a path below some folder. Loaded by LD_PRELOAD.

   faults.py counts the calls of a whole merge first (nth = 0: none fails), and then lets one after the other fail. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static char wanted[32];
static int nth, code;
static volatile int seen;

void fault_arm(const char *below, const char *call, int number, int error) {
    snprintf(folder, sizeof folder, "%s", below);
    nth = number;
    code = error;
    seen = 0;
    snprintf(wanted, sizeof wanted, "%s", call);
}

int fault_seen(void) { return seen; }

static int fails(const char *call, const char *path, int descriptor) {
    char link[64], found[4096];
    if (!wanted[0] || strcmp(call, wanted) != 0) return 0;
    if (path == NULL || path[0] != '/') {
        if (descriptor < 0) {
            if (path == NULL || getcwd(found, sizeof found) == NULL) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
            ssize_t length = readlink(link, found, sizeof found - 1);
            if (length < 0) return 0;
            found[length] = 0;
        }
        path = found;
    }
    if (strncmp(path, folder, strlen(folder)) != 0) return 0;
    if (__sync_add_and_fetch(&seen, 1) != nth) return 0;
    errno = code;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
#define ON_PATH(name, call, parameters, path, arguments) \
    int name parameters { return fails(call, path, -1) ? -1 : REAL(name) arguments; }
#define ON_FILE(type, name, call, parameters, descriptor, arguments) \
    type name parameters { return fails(call, NULL, descriptor) ? -1 : REAL(name) arguments; }

int open(const char *path, int flags, ...) { MODE(flags) return fails("open", path, -1) ? -1 : REAL(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return fails("open", path, -1) ? -1 : REAL(open64)(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return fails("open", path, at) ? -1 : REAL(openat)(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return fails("open", path, at) ? -1 : REAL(openat64)(at, path, flags, mode); }
ON_PATH(mkdir, "mkdir", (const char *path, mode_t mode), path, (path, mode))
ON_PATH(rename, "rename", (const char *from, const char *to), from, (from, to))
ON_PATH(unlink, "unlink", (const char *path), path, (path))
ON_PATH(rmdir, "rmdir", (const char *path), path, (path))
int unlinkat(int at, const char *path, int flags) { return fails("unlink", path, at) ? -1 : REAL(unlinkat)(at, path, flags); }
ON_FILE(int, fsync, "fsync", (int file), file, (file))
ON_FILE(int, ftruncate, "ftruncate", (int file, off_t size), file, (file, size))
ON_FILE(int, ftruncate64, "ftruncate", (int file, off64_t size), file, (file, size))
ON_FILE(ssize_t, write, "write", (int file, const void *data, size_t size), file, (file, data, size))
ON_FILE(ssize_t, pwrite, "write", (int file, const void *data, size_t size, off_t at), file, (file, data, size, at))
ON_FILE(ssize_t, pwrite64, "write", (int file, const void *data, size_t size, off64_t at), file, (file, data, size, at))
ON_FILE(ssize_t, read, "read", (int file, void *data, size_t size), file, (file, data, size))
ON_FILE(ssize_t, pread64, "read", (int file, void *data, size_t size, off64_t at), file, (file, data, size, at))
ON_FILE(ssize_t, preadv64, "read", (int file, const struct iovec *parts, int count, off64_t at), file, (file, parts, count, at))
int posix_fallocate64(int file, off64_t at, off64_t size) { return fails("fallocate", NULL, file) ? errno : REAL(posix_fallocate64)(file, at, size); }
