#include "textflag.h"

// See sig_amd64.s. The link register holds the restorer's address.

// write(wakeFD, &wakeOne, 8)
TEXT ·onChild(SB),NOSPLIT|NOFRAME,$0-0
	MOVW	·wakeFD(SB), R0
	MOVD	$·wakeOne(SB), R1
	MOVD	$8, R2
	MOVD	$64, R8
	SVC
	RET

TEXT ·onIgnored(SB),NOSPLIT|NOFRAME,$0-0
	RET

// rt_sigreturn()
TEXT ·onReturn(SB),NOSPLIT|NOFRAME,$0-0
	MOVD	$139, R8
	SVC
	BRK

TEXT ·onChildPC(SB),NOSPLIT,$0-8
	MOVD	$·onChild(SB), R0
	MOVD	R0, ret+0(FP)
	RET

TEXT ·onIgnoredPC(SB),NOSPLIT,$0-8
	MOVD	$·onIgnored(SB), R0
	MOVD	R0, ret+0(FP)
	RET

TEXT ·onReturnPC(SB),NOSPLIT,$0-8
	MOVD	$·onReturn(SB), R0
	MOVD	R0, ret+0(FP)
	RET
