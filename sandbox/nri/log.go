package nri

import (
	"context"
	"fmt"
	"strings"
	"sync"

	nrilog "github.com/containerd/nri/pkg/log"
	"k8s.io/klog/v2"
)

// logger is the library's way to this daemon's log.
type logger struct{}

// setLogger makes the library log to the daemon's log. It has one logger for the
// whole process.
var setLogger = sync.OnceFunc(func() { nrilog.Set(logger{}) })

func (logger) Debugf(_ context.Context, format string, args ...any) { say(5, format, args) }
func (logger) Infof(_ context.Context, format string, args ...any)  { say(4, format, args) }
func (logger) Warnf(_ context.Context, format string, args ...any)  { say(0, format, args) }

// Errorf is no louder than a warning: most are about what one plugin did. That
// there is no WebAssembly comes with every start.
func (logger) Errorf(_ context.Context, format string, args ...any) {
	if strings.HasPrefix(format, "failed to initialize WASM support") {
		return
	}
	say(0, format, args)
}

func say(level int, format string, args []any) {
	if log := klog.Background().V(level); log.Enabled() {
		log.Info("NRI library", "says", fmt.Sprintf(format, args...))
	}
}
