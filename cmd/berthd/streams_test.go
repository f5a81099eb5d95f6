package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func mustPair(t *testing.T, dir string, serial int64) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: raw}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// A reload takes a new certificate, and keeps the old one when that is broken.
func TestStreamCertificate(t *testing.T) {
	dir := t.TempDir()
	c := defaults()
	c.StreamCertFile, c.StreamKeyFile = mustPair(t, dir, 1)
	cert := new(certificate)
	serial := func() int64 {
		t.Helper()
		got, err := cert.get(nil)
		if err != nil {
			t.Fatal(err)
		}
		x, err := x509.ParseCertificate(got.Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		return x.SerialNumber.Int64()
	}
	if err := cert.load(c); err != nil || serial() != 1 {
		t.Fatalf("first: %v", err)
	}
	mustPair(t, dir, 2)
	if err := cert.load(c); err != nil || serial() != 2 {
		t.Errorf("second: %v", err)
	}
	if err := os.WriteFile(c.StreamKeyFile, []byte("none"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := cert.load(c); err == nil || serial() != 2 {
		t.Errorf("broken key: %v, want an error and the old certificate", err)
	}
	c.StreamCertFile = ""
	if err := cert.load(c); err == nil || serial() != 2 {
		t.Errorf("taken away: %v, want an error and the old certificate", err)
	}
}
