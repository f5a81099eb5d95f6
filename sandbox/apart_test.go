package sandbox

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cni/netns"
)

func TestAnswersAtOnce(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(dir+"/a", 0o700), os.Symlink("a", dir+"/link"), os.Symlink("loop", dir+"/loop")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir + "/a", dir + "/link", dir + "/loop", dir + "/a/../link"} {
		atOnce := !tellsCached()
		for try := 0; !atOnce && try < 10_000; try++ { // mounts and renames elsewhere make the kernel look anew
			_, _ = os.Stat(path)
			atOnce = answersAtOnce(path)
		}
		if !atOnce {
			t.Errorf("%s: does not answer at once, although it was looked at before", path)
		}
		if err := awaitAnswer(path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestCrowd: so many looks may wait for volumes that do not answer, and no more.
func TestCrowd(t *testing.T) {
	c := crowd{make(chan struct{}, 2), time.Millisecond}
	one, err := c.enter()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.enter(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.enter(); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "2 looks") {
		t.Errorf("the third of two: %v, want an error with their number", err)
	}
	one()
	if _, err := c.enter(); err != nil {
		t.Errorf("after one has left: %v", err)
	}
}

// TestCloseAllBut: the thread has none of the process's files, the process has them
// all, and the scheduler works on as if nothing had happened.
func TestCloseAllBut(t *testing.T) {
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0") // so that there is something to wait for
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	fd := int(f.Fd())
	keep := runtimeFiles()
	if len(keep) == 0 {
		t.Fatal("no descriptors of the scheduler: they are looked for in a wrong way")
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 200 {
				var here, kept error
				err := netns.OnThread(func() error {
					closeAllBut(keep)
					_, here = unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
					_, kept = unix.FcntlInt(uintptr(keep[0]), unix.F_GETFD, 0)
					return nil
				})
				if err != nil || !errors.Is(here, unix.EBADF) || kept != nil {
					t.Errorf("%v; a file of the process: %v, want EBADF; one of the scheduler: %v", err, here, kept)
					return
				}
				c, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, c) // waits by the scheduler's descriptors
				c.Close()
			}
		})
	}
	wg.Wait()
	if _, err := f.Stat(); err != nil {
		t.Errorf("the process has lost a file: %v", err)
	}
}
